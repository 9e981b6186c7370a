"""Quantize so that what layers give out stays close, not each weight by itself (GPTQ).

Does: see what goes into every linear layer on calibration rows; quantize its inputs one after the
other, and let the inputs that follow make up for each rounding error; an embedding that is the
vocabulary head as well counts as a linear layer. Does not: choose the rows, write files, or
quantize other embeddings and expert layers, which are rounded afterwards.

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ", arXiv 2210.17323, sections 3.2 and 3.3. The
order of the inputs is the authors' own later addition (`act_order` of github.com/IST-DASLab/gptq).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import scipy.linalg
from mlx.utils import tree_unflatten

from mlx_ft.backend import on_cpu
from mlx_ft.export.calibration import (
    Batch,
    Inputs,
    Layers,
    calibration_batches,
    see_inputs,
    watching,
)
from mlx_ft.stand_ins import EQUAL_TOLERANCE, Part, relative_difference

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Order = npt.NDArray[np.int64]

# Share of the mean diagonal that is added to it (the paper's section 3.3, step 3, has 0.01). More
# keeps what calibration rows say nothing about; LOG.md has what was tried.
DAMPING = 0.04
# The same for an embedding that is also the head: errors that cancel each other out in its products
# do not when a token is looked up. 0.3 to 3 are alike; 0 and 30 diverge by a third more (LOG.md).
LOOKUP_DAMPING = 0.3
# Products of inputs held at a time; a model of many or wide layers is run once for each part.
PRODUCT_BYTES = 1 << 30
# Inputs whose corrections are made one by one before the rest of their group hears of them.
BLOCK = 16
# Outputs quantized at a time: they do not depend on each other.
OUTPUT_CHUNK = 1 << 14


def quantizable_layers(model: nn.Module, group_size: int) -> dict[str, nn.Linear | nn.Embedding]:
    """Return the plain linear layers and embeddings whose inputs make whole groups, from the
    model's first to its last.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding) and module.weight.shape[-1] % group_size == 0
    }

    def place(name: str) -> tuple[float, str]:
        number = re.search(r"\.(\d+)\.", f".{name}.")
        return (float(number[1]) if number else math.inf, name)

    return {name: found[name] for name in sorted(found, key=place)}


def _parts(layers: Layers, limit_bytes: int) -> Iterator[Layers]:
    """Cut the layers into parts whose products stay within the limit, one layer at least."""
    part: dict[str, nn.Linear | nn.Embedding] = {}
    held = 0
    for name, layer in layers.items():
        product_bytes = 4 * layer.weight.shape[-1] ** 2
        if part and held + product_bytes > limit_bytes:
            yield part
            part, held = {}, 0
        part[name] = layer
        held += product_bytes
    if part:
        yield part


def input_order(products: Floats, group_size: int) -> Order:
    """Return the inputs from the largest to the smallest, group by group, and so within each group.

    What comes first is made up for by all the others. Groups stay together because each has one
    scale, which is chosen when its turn comes.
    """
    size = np.diag(products).reshape(-1, group_size)
    groups = np.argsort(-size.sum(axis=1), kind="stable")
    within = np.argsort(-size[groups], axis=1, kind="stable")
    order: Order = (groups[:, None] * group_size + within).reshape(-1)
    return order


def correction_factor(products: Floats, damping: float = DAMPING) -> Floats:
    """Return the upper triangular U (inputs, inputs) with U' U = the inverse of the products.

    Row i of U, over U[i, i], says how the inputs after i make up for an error at i (section 3.3).
    The inverse of a factor R of products = R R', R upper triangular, is such a U; R is the Cholesky
    factor of the products with their order reversed.
    """
    damped = products.astype(np.float64)
    mean = float(np.mean(np.diag(damped)))
    # Inputs that are always zero have no products at all; any positive number will do.
    damped[np.diag_indices_from(damped)] += damping * mean if mean > 0 else 1.0
    reversed_factor = scipy.linalg.cholesky(damped[::-1, ::-1], lower=True)
    factor = np.ascontiguousarray(reversed_factor[::-1, ::-1])
    inverse, info = scipy.linalg.lapack.dtrtri(factor)
    assert info == 0, "a Cholesky factor has no zero on its diagonal"
    return np.ascontiguousarray(inverse, dtype=np.float32)


def quantize_inputs(
    weight: Floats, factor: Floats, order: Order, bits: int, group_size: int, dtype: mx.Dtype
) -> tuple[Codes, Floats, Floats]:
    """Return codes (outputs, inputs), scales and biases (outputs, groups) of a weight.

    `factor` belongs to the products in the given `order` of inputs, which keeps groups together.
    Scales and biases are those that mlx would choose for each group as it is when its turn comes,
    rounded to `dtype` as they will be stored.
    """
    left = np.asarray(weight.T, dtype=np.float32)[order]  # one input a row: they go in turn
    inputs, outputs = left.shape
    codes = np.empty((inputs, outputs), np.uint8)
    scales = np.empty((inputs // group_size, outputs), np.float32)
    biases = np.empty_like(scales)
    errors = np.empty((group_size, outputs), np.float32)
    for start in range(0, inputs, group_size):
        end, group = start + group_size, int(order[start]) // group_size
        block = left[start:end]
        _, scale, bias = mx.quantize(mx.array(block.T).astype(dtype), group_size, bits)
        scales[group] = np.array(scale.astype(mx.float32))[:, 0]
        biases[group] = np.array(bias.astype(mx.float32))[:, 0]
        step = np.where(scales[group] == 0, 1.0, scales[group]).astype(np.float32)
        for index in range(group_size):
            place = start + index
            code = np.clip(np.rint((block[index] - biases[group]) / step), 0, 2**bits - 1)
            codes[order[place]] = code
            errors[index] = (block[index] - (code * step + biases[group])) / factor[place, place]
            near = min(group_size, (index // BLOCK + 1) * BLOCK)
            block[index + 1 : near] -= np.outer(
                factor[place, place + 1 : start + near], errors[index]
            )
            if index + 1 == near and near < group_size:
                first = start + near - BLOCK
                weights = factor[first : start + near, start + near : end]
                block[near:] -= weights.T @ errors[near - BLOCK : near]
        left[end:] -= factor[start:end, end:].T @ errors
    return codes.T, scales.T, biases.T


def pack_codes(codes: Codes, bits: int) -> mx.array:
    """Return codes (outputs, inputs) as mlx holds them: uint32 (outputs, inputs * bits / 32).

    A code takes `bits` bits, lowest bit first, right after the code before it.
    """
    single = np.unpackbits(np.ascontiguousarray(codes)[..., None], axis=-1, bitorder="little")
    stream = single[..., :bits].reshape(codes.shape[0], -1)
    return mx.array(np.packbits(stream, axis=-1, bitorder="little").view(np.uint32))


def quantize_layers(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    bits: int,
    group_size: int,
    dtype: mx.Dtype,
    on_layer: Callable[[int, int], None],
) -> tuple[str, ...]:
    """Replace the model's plain linear layers, and a tied embedding, by quantized ones; return
    their names.

    `rows` (token ids) are run through the model one of its layers after the other, each fed by
    what is quantized already, as it will be in use; through the whole model, in parts, where an
    architecture does not allow it. `on_layer(done, of)` after each linear layer.
    """
    how = _How(bits, group_size, dtype)
    layers = quantizable_layers(model, group_size)
    done: list[str] = []

    def replaced(name: str) -> None:
        done.append(name)
        on_layer(len(done), len(layers))

    if goes_layer_by_layer(model, rows):
        _one_layer_after_the_other(model, layers, calibration_batches(rows), how, replaced)
    else:
        for part in _parts(layers, PRODUCT_BYTES):
            seen = see_inputs(model, part, rows)
            _replace(model, part, seen, how, replaced)
    return tuple(done)


@dataclass(frozen=True)
class _How:
    """Bits and group size of the quantized layers, and the type of their scales."""

    bits: int
    group_size: int
    dtype: mx.Dtype


def goes_layer_by_layer(model: nn.Module, rows: Sequence[Sequence[int]]) -> bool:
    """Say whether running a model one layer at a time gives what it gives as a whole, on the
    longest row.
    """
    ids = mx.array([max(rows, key=len)])
    try:
        embed, parts, norm = _one_by_one(model.model)
        hidden = embed(ids)
        for part in parts:
            hidden = part(ids, hidden)
        return relative_difference(norm(ids, hidden), model.model(ids)) <= EQUAL_TOLERANCE
    except Exception:  # any model's code, called in a way that its author did not plan
        return False


def _one_by_one(inner: nn.Module) -> tuple[Part, list[Part], Part]:
    """Return an inner model as what comes before its layers, each layer, and its last norm."""
    parts = [Part(inner, index, [layer], norm=False) for index, layer in enumerate(inner.layers)]
    return Part(inner, 0, [], norm=False), parts, Part(inner, len(parts), [], norm=True)


def _one_layer_after_the_other(
    model: nn.Module,
    layers: Layers,
    batches: Sequence[Batch],
    how: _How,
    replaced: Callable[[str], None],
) -> None:
    embed, parts, norm = _one_by_one(model.model)
    states = [embed(batch.ids) for batch in batches]
    mx.eval(states)
    left = dict(layers)
    quantized: dict[str, nn.Module] = {}
    for index, part in enumerate(parts):
        here = {name: left.pop(name) for name in list(left) if f".layers.{index}." in f".{name}"}
        if here:
            with watching(model, here) as seen:
                for batch, hidden in zip(batches, states, strict=True):
                    seen.begin(batch.positions)
                    mx.eval(part(batch.ids, hidden), seen.products)
            now = _replace(model, here, seen, how, replaced)
            quantized |= now
            if on_cpu():  # the same weights, at the speed of float32
                expanded = [(name, _expanded(here[name], layer)) for name, layer in now.items()]
                model.update_modules(tree_unflatten(expanded))
        states = [
            _evaluated(part(batch.ids, hidden))
            for batch, hidden in zip(batches, states, strict=True)
        ]
    seen = Inputs()
    for batch, hidden in zip(batches, states, strict=True):
        seen.begin(batch.positions)
        final = norm(batch.ids, hidden)
        for name in left:
            if _is_head(model, name):
                seen.see(name, final)
        mx.eval(seen.products)
    model.update_modules(tree_unflatten(list(quantized.items())))
    _replace(model, left, seen, how, replaced)


def _expanded(layer: nn.Module, quantized: nn.Module) -> nn.Linear:
    """Return a plain linear layer with the weights that a quantized one stands for."""
    expanded = copy.copy(layer)
    expanded.weight = mx.dequantize(
        quantized.weight,
        quantized.scales.astype(mx.float32),
        quantized.biases.astype(mx.float32),
        quantized.group_size,
        quantized.bits,
    )
    return expanded


def _evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array


def _is_head(model: nn.Module, name: str) -> bool:
    """Say whether a layer outside of the model's layers makes logits of the final states."""
    if name == "lm_head":
        return True
    return name == "model.embed_tokens" and "lm_head" not in model


def _replace(
    model: nn.Module,
    part: Layers,
    seen: Inputs,
    how: _How,
    replaced: Callable[[str], None],
) -> dict[str, nn.Module]:
    """Quantize the layers of which inputs were seen, those that are fed alike together; return
    what stands in their places now.
    """
    now: dict[str, nn.Module] = {}
    for owner in dict.fromkeys(seen.owner.values()):
        products = np.array(seen.products.pop(owner))
        order = input_order(products, how.group_size)
        looked_up = isinstance(part[owner], nn.Embedding)
        factor = correction_factor(
            products[np.ix_(order, order)], LOOKUP_DAMPING if looked_up else DAMPING
        )
        for name in (n for n, o in seen.owner.items() if o == owner):
            now[name] = _quantize_layer(part[name], factor, order, how)
            model.update_modules(tree_unflatten([(name, now[name])]))
            replaced(name)
    return now


def _quantize_layer(
    layer: nn.Linear | nn.Embedding,
    factor: Floats,
    order: Order,
    how: _How,
) -> nn.QuantizedLinear | nn.QuantizedEmbedding:
    bits, group_size, dtype = how.bits, how.group_size, how.dtype
    outputs, inputs = layer.weight.shape
    parts: list[tuple[mx.array, mx.array, mx.array]] = []
    for start in range(0, outputs, OUTPUT_CHUNK):
        weight = np.array(layer.weight[start : start + OUTPUT_CHUNK].astype(mx.float32))
        codes, scales, biases = quantize_inputs(weight, factor, order, bits, group_size, dtype)
        parts.append((pack_codes(codes, bits), mx.array(scales), mx.array(biases)))
    # Made with other numbers first: the classes have no other way to be given their parts.
    if isinstance(layer, nn.Embedding):
        quantized = nn.QuantizedEmbedding(outputs, inputs, group_size, bits)
    else:
        quantized = nn.QuantizedLinear(inputs, outputs, "bias" in layer, group_size, bits)
    whole = [mx.concatenate(list(each)) for each in zip(*parts, strict=True)]
    quantized.weight = whole[0]
    quantized.scales, quantized.biases = whole[1].astype(dtype), whole[2].astype(dtype)
    if "bias" in layer:
        quantized.bias = layer.bias
    mx.eval(quantized.parameters())
    return quantized
