"""Quantize so that what layers give out stays close, not each weight by itself (GPTQ).

Does: see what goes into every linear layer on calibration rows; quantize its inputs one after the
other, and let the inputs that follow make up for each rounding error; an embedding that is the
vocabulary head as well counts as a linear layer. Does not: choose the rows, write files, or
quantize other embeddings and expert layers, which are rounded afterwards.

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ", arXiv 2210.17323, sections 3.2 and 3.3. The
order of the inputs is the authors' own later addition (`act_order` of github.com/IST-DASLab/gptq).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import scipy.linalg
from mlx.utils import tree_unflatten

from mlx_ft.tokens import group_rows, pad_rows

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Order = npt.NDArray[np.int64]
Layers = dict[str, nn.Linear | nn.Embedding]

# Share of the mean diagonal that is added to it (the paper's section 3.3, step 3, has 0.01). More
# keeps what calibration rows say nothing about; LOG.md has what was tried.
DAMPING = 0.04
# The same for an embedding that is also the head: errors that cancel each other out in its products
# do not when a token is looked up. 0.3 to 3 are alike; 0 and 30 diverge by a third more (LOG.md).
LOOKUP_DAMPING = 0.3
# Products of inputs held at a time; a model of many or wide layers is run once for each part.
PRODUCT_BYTES = 1 << 30
# Padded tokens that go through the model together: their products are added up in one go.
BATCH_TOKENS = 1024
# Inputs whose corrections are made one by one before the rest of their group hears of them.
BLOCK = 16
# Outputs quantized at a time: they do not depend on each other.
OUTPUT_CHUNK = 1 << 14


@dataclass
class _Inputs:
    """What was seen so far: layers fed by one array share its products (inputs, inputs).

    `positions` are those tokens of the flattened batch that are no padding.
    """

    products: dict[str, mx.array] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    last: tuple[mx.array, str] | None = None
    positions: mx.array | None = None

    def see(self, name: str, inputs: mx.array) -> None:
        if self.last is not None and self.last[0] is inputs:
            self.owner[name] = self.last[1]
            return
        self.last = (inputs, name)
        self.owner[name] = name
        tokens = inputs.reshape(-1, inputs.shape[-1])[self.positions].astype(mx.float32)
        product = tokens.T @ tokens
        held = self.products.get(name)
        self.products[name] = product if held is None else held + product


class _Watched(nn.Module):  # type: ignore[misc]  # mlx.nn has no type information
    """Stands in for a linear layer, or an embedding, while its inputs are wanted."""

    def __init__(self, layer: nn.Linear | nn.Embedding, name: str, seen: _Inputs) -> None:
        super().__init__()
        self._layer, self._name, self._seen = layer, name, seen

    def __call__(self, inputs: mx.array) -> mx.array:
        if isinstance(self._layer, nn.Linear):
            self._seen.see(self._name, inputs)
        outputs: mx.array = self._layer(inputs)
        return outputs

    def as_linear(self, inputs: mx.array) -> mx.array:
        """Give the logits of an embedding that is the vocabulary head too."""
        self._seen.see(self._name, inputs)
        logits: mx.array = self._layer.as_linear(inputs)
        return logits


def quantizable_layers(model: nn.Module, group_size: int) -> Layers:
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
    part: Layers = {}
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


def see_inputs(model: nn.Module, layers: Layers, rows: Sequence[Sequence[int]]) -> _Inputs:
    """Run the rows through the model and return the products of what went into `layers`."""
    seen = _Inputs()
    watched = [(name, _Watched(layer, name, seen)) for name, layer in layers.items()]
    model.update_modules(tree_unflatten(watched))
    try:
        for group in group_rows(list(map(len, rows)), BATCH_TOKENS):
            batch = [rows[index] for index in group]
            padded = pad_rows(batch)
            width = padded.shape[1]
            real = [i * width + place for i, row in enumerate(batch) for place in range(len(row))]
            seen.last, seen.positions = None, mx.array(real)
            mx.eval(model(mx.array(padded)), seen.products)
    finally:
        model.update_modules(tree_unflatten(list(layers.items())))
    return seen


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

    `rows` (token ids) are run through the model in parts, later ones through what is quantized
    already, so that they make up for that too. `on_layer(done, of)` after each layer.
    """
    layers = quantizable_layers(model, group_size)
    done: list[str] = []
    for part in _parts(layers, PRODUCT_BYTES):
        seen = see_inputs(model, part, rows)
        for owner in dict.fromkeys(seen.owner.values()):
            products = np.array(seen.products.pop(owner))
            order = input_order(products, group_size)
            looked_up = isinstance(part[owner], nn.Embedding)
            factor = correction_factor(
                products[np.ix_(order, order)], LOOKUP_DAMPING if looked_up else DAMPING
            )
            for name in (n for n, o in seen.owner.items() if o == owner):
                quantized = _quantize_layer(part[name], factor, order, bits, group_size, dtype)
                model.update_modules(tree_unflatten([(name, quantized)]))
                done.append(name)
                on_layer(len(done), len(layers))
    return tuple(done)


def _quantize_layer(
    layer: nn.Linear | nn.Embedding,
    factor: Floats,
    order: Order,
    bits: int,
    group_size: int,
    dtype: mx.Dtype,
) -> nn.QuantizedLinear | nn.QuantizedEmbedding:
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
