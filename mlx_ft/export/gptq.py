"""Quantize so that what layers give out stays close, not each weight by itself (GPTQ).

Does: see what goes into every linear layer on calibration rows and quantize it for that, one layer
of the model after the other, each fed by what is quantized already; an embedding that is the
vocabulary head as well counts as a linear layer. Does not: the arithmetic (`gptq_math.py`), choose
the rows, write files, or quantize other embeddings and expert layers, which are rounded instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ft.export.calibration import Inputs, Layers, calibration_batches, see_inputs, watching
from mlx_ft.export.fuse import FusedModel, widened
from mlx_ft.export.gptq_math import (
    DAMPING,
    Floats,
    How,
    Order,
    correction_factor,
    input_order,
    packed_rows,
)
from mlx_ft.export.layerwise import EMBEDDING, HEAD, Lane, layer_prefix

# The damping for an embedding that is also the head: errors that cancel each other out in its
# products do not when a token is looked up. 0.3 to 3 are alike; 0 and 30 diverge by a third more
# (LOG.md).
LOOKUP_DAMPING = 0.3
# Products of inputs held at a time; a model of many or wide layers is run once for each part.
PRODUCT_BYTES = 1 << 30

# Takes (module, first row, packed codes, scales, biases) as they are done.
Put = Callable[[str, int, mx.array, mx.array, mx.array], None]


def quantizable_layers(fused: FusedModel, group_size: int) -> dict[str, nn.Linear | nn.Embedding]:
    """Return the plain linear layers, and the embedding, of a model whose inputs make whole groups,
    from the model's first to its last.
    """
    found = {
        name: module
        for name, module in fused.plain.named_modules()
        if type(module) in (nn.Linear, nn.Embedding)
        and fused.weights[f"{name}.weight"].shape[-1] % group_size == 0
    }

    def place(name: str) -> tuple[float, str]:
        number = re.search(r"\.(\d+)\.", f".{name}.")
        return (float(number[1]) if number else math.inf, name)

    return {name: found[name] for name in sorted(found, key=place)}


class _Quantizing:
    """Layers that are quantized as soon as their inputs were seen; `done` are those that were."""

    def __init__(
        self, layers: Layers, how: How, put: Put, on_layer: Callable[[int, int], None]
    ) -> None:
        self.layers, self._how, self._put, self._on_layer = layers, how, put, on_layer
        self.done: list[str] = []

    def seen(self, seen: Inputs, *, in_use: bool) -> None:
        """Quantize the layers of which inputs were seen, those that are fed alike together; put
        the weights they then stand for in their places, if they will be used.
        """
        for owner in dict.fromkeys(seen.owner.values()):
            looked_up = isinstance(self.layers[owner], nn.Embedding)
            damping = LOOKUP_DAMPING if looked_up else DAMPING
            factor, order = _correction(seen.products.pop(owner), damping, self._how.group_size)
            for name in (n for n, o in seen.owner.items() if o == owner):
                layer = self.layers[name]
                rows = partial(_rows_of, layer.weight)
                parts = self.weight(name, rows, layer.weight.shape[0], factor, order)
                if in_use:
                    bits = self._how.of(name).bits
                    wide = [self._stands_for(bits, *part) for part in parts]
                    layer.weight = mx.concatenate(wide)
                    mx.eval(layer.weight)

    def weight(
        self,
        name: str,
        rows: Callable[[int, int], mx.array],
        outputs: int,
        factor: Floats,
        order: Order,
    ) -> list[tuple[mx.array, mx.array, mx.array]]:
        """Quantize one weight; return its parts."""
        parts = []
        for first, *part in packed_rows(rows, outputs, factor, order, self._how.of(name)):
            mx.eval(part)
            self._put(name, first, *part)
            parts.append((part[0], part[1], part[2]))
        self.done.append(name)
        self._on_layer(len(self.done), len(self.layers))
        return parts

    def _stands_for(
        self, bits: int, packed: mx.array, scales: mx.array, biases: mx.array
    ) -> mx.array:
        return mx.dequantize(packed, widened(scales), widened(biases), self._how.group_size, bits)


def _rows_of(weight: mx.array, first: int, end: int) -> mx.array:
    return weight[first:end]


def _correction(products: mx.array, damping: float, group_size: int) -> tuple[Floats, Order]:
    seen = np.array(products)
    order = input_order(seen, group_size)
    return correction_factor(seen[np.ix_(order, order)], damping), order


def quantize_by_layers(
    lane: Lane,
    layers: Layers,
    rows: Sequence[Sequence[int]],
    how: How,
    put: Put,
    on_layer: Callable[[int, int], None],
) -> tuple[str, ...]:
    """Quantize those of a model's `layers` that rows (token ids) go through; return their names.

    Each layer of the model is loaded, quantized, and fed with what is quantized before it, as it
    will be in use; `on_layer(done, of)` after each linear layer.
    """
    quantizing = _Quantizing(layers, how, put, on_layer)
    batches = calibration_batches(rows)
    parts, norm = lane.one_by_one()
    states: list[mx.array | None] = [None] * len(batches)
    for index, part in enumerate(parts):
        lane.load(index)
        here = {name: each for name, each in layers.items() if name.startswith(layer_prefix(index))}
        with watching(lane.model, here) as seen:
            for batch, hidden in zip(batches, states, strict=True):
                seen.begin(batch.positions)
                mx.eval(part(batch.ids, hidden), seen.products)
        quantizing.seen(seen, in_use=True)
        for place, batch in enumerate(batches):
            states[place] = part(batch.ids, states[place])
            mx.eval(states[place])
        lane.unload(index)
    name = HEAD if HEAD in lane.model else EMBEDDING
    if name in layers:
        final = Inputs()
        for batch, hidden in zip(batches, states, strict=True):
            final.begin(batch.positions)
            final.see(name, norm(batch.ids, hidden))
            mx.eval(final.products)
        damping = DAMPING if name == HEAD else LOOKUP_DAMPING
        factor, order = _correction(final.products.pop(name), damping, how.group_size)
        quantizing.weight(name, lane.head_rows, lane.vocabulary, factor, order)
    return tuple(quantizing.done)


def quantize_at_once(
    model: nn.Module,
    layers: Layers,
    rows: Sequence[Sequence[int]],
    how: How,
    put: Put,
    on_layer: Callable[[int, int], None],
) -> tuple[str, ...]:
    """Do as `quantize_by_layers` with a model that is in memory as a whole, in as many runs of the
    rows as its products take.
    """
    quantizing = _Quantizing(layers, how, put, on_layer)
    for part in _parts(layers, PRODUCT_BYTES):
        quantizing.seen(see_inputs(model, part, rows), in_use=False)
    return tuple(quantizing.done)


def _parts(layers: Layers, limit_bytes: int) -> Iterator[Layers]:
    """Cut the layers into parts whose products stay within the limit, one layer at least."""
    part: dict[str, nn.Linear | nn.Embedding] = {}
    held_bytes = 0
    for name, layer in layers.items():
        product_bytes = 4 * layer.weight.shape[-1] ** 2
        if part and held_bytes + product_bytes > limit_bytes:
            yield part
            part, held_bytes = {}, 0
        part[name] = layer
        held_bytes += product_bytes
    if part:
        yield part
