"""GPTQ, layer by layer: quantize each linear layer so that its outputs stay close.

Does: collect the inputs of every linear layer on calibration rows and quantize the layer for them.
Each layer of the model is fed by the quantized layers before it. An embedding that is also the
vocabulary head counts as a linear layer.
Does not: compute the corrections (`gptq_math.py`), choose the rows, write files, or quantize other
embeddings and expert layers, which are rounded instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ft.export.calibration import (
    InputStatistics,
    Layers,
    calibration_batches,
    input_statistics,
    watching,
)
from mlx_ft.export.fuse import FusedModel, widened
from mlx_ft.export.gptq_math import (
    DAMPING,
    Floats,
    Order,
    QuantizationSettings,
    correction_factor,
    input_order,
    packed_rows,
)
from mlx_ft.export.layerwise import EMBEDDING, HEAD, LayerwiseModel, layer_prefix
from mlx_ft.system.console import Progress

# Damping for an embedding that is also the head: errors that cancel in its products do not cancel
# when a token is looked up. 0.3 to 3 are alike; 0 and 30 diverge by a third more (LOG.md).
LOOKUP_DAMPING = 0.3
# Products of inputs that are held at a time. A model of many or wide layers is run once per part.
PRODUCT_BYTES = 1 << 30

# Takes (module, first row, packed codes, scales, biases) of each part as soon as it is quantized.
WritePacked = Callable[[str, int, mx.array, mx.array, mx.array], None]


def quantizable_layers(fused: FusedModel, group_size: int) -> dict[str, nn.Linear | nn.Embedding]:
    """Return the plain linear layers and the embedding whose inputs make whole groups, in the
    model's order.
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
    """Layers that are quantized as soon as their inputs are known; `done` names the finished."""

    def __init__(
        self,
        layers: Layers,
        settings: QuantizationSettings,
        write: WritePacked,
        progress: Progress,
    ) -> None:
        self.layers, self._settings, self._write, self._progress = layers, settings, write, progress
        self.done: list[str] = []

    def quantize(self, seen: InputStatistics, *, in_use: bool) -> None:
        """Quantize the layers whose inputs were seen, those with the same inputs together.

        in_use: give each layer the weight that its codes stand for, because it will be run again.
        """
        for owner in dict.fromkeys(seen.owner.values()):
            looked_up = isinstance(self.layers[owner], nn.Embedding)
            damping = LOOKUP_DAMPING if looked_up else DAMPING
            factor, order = _correction(
                seen.products.pop(owner), damping, self._settings.group_size
            )
            for name in (n for n, o in seen.owner.items() if o == owner):
                layer = self.layers[name]
                rows = partial(_rows_of, layer.weight)
                parts = self.weight(name, rows, layer.weight.shape[0], factor, order)
                if in_use:
                    bits = self._settings.of(name).bits
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
        """Quantize one weight and write it; return its parts."""
        parts = []
        for first, *part in packed_rows(rows, outputs, factor, order, self._settings.of(name)):
            mx.eval(part)
            self._write(name, first, *part)
            parts.append((part[0], part[1], part[2]))
        self.done.append(name)
        done, total = len(self.done), len(self.layers)
        self._progress.update(done / total, f"layer {done} of {total}")
        return parts

    def _stands_for(
        self, bits: int, packed: mx.array, scales: mx.array, biases: mx.array
    ) -> mx.array:
        return mx.dequantize(
            packed, widened(scales), widened(biases), self._settings.group_size, bits
        )


def _rows_of(weight: mx.array, first: int, end: int) -> mx.array:
    return weight[first:end]


def _correction(products: mx.array, damping: float, group_size: int) -> tuple[Floats, Order]:
    seen = np.array(products)
    order = input_order(seen, group_size)
    return correction_factor(seen[np.ix_(order, order)], damping), order


def quantize_by_layers(
    layerwise: LayerwiseModel,
    layers: Layers,
    rows: Sequence[Sequence[int]],
    settings: QuantizationSettings,
    write: WritePacked,
    progress: Progress,
) -> tuple[str, ...]:
    """Quantize those of a model's `layers` that rows (token ids) go through; return their names.

    Each layer of the model is loaded, quantized, and fed by the quantized layers before it, as in
    use. Reports to `progress` after each linear layer: done is the share of all.
    """
    quantizing = _Quantizing(layers, settings, write, progress)
    batches = calibration_batches(rows)
    parts, norm = layerwise.one_by_one()
    states: list[mx.array | None] = [None] * len(batches)
    for index, part in enumerate(parts):
        layerwise.load(index)
        here = {name: each for name, each in layers.items() if name.startswith(layer_prefix(index))}
        with watching(layerwise.model, here) as seen:
            for batch, hidden in zip(batches, states, strict=True):
                seen.begin(batch.positions)
                mx.eval(part(batch.ids, hidden), seen.products)
        quantizing.quantize(seen, in_use=True)
        for place, batch in enumerate(batches):
            states[place] = part(batch.ids, states[place])
            mx.eval(states[place])
        layerwise.unload(index)
    name = HEAD if HEAD in layerwise.model else EMBEDDING
    if name in layers:
        final = InputStatistics()
        for batch, hidden in zip(batches, states, strict=True):
            final.begin(batch.positions)
            final.see(name, norm(batch.ids, hidden))
            mx.eval(final.products)
        damping = DAMPING if name == HEAD else LOOKUP_DAMPING
        factor, order = _correction(final.products.pop(name), damping, settings.group_size)
        quantizing.weight(name, layerwise.head_rows, layerwise.vocabulary, factor, order)
    return tuple(quantizing.done)


def quantize_at_once(
    model: nn.Module,
    layers: Layers,
    rows: Sequence[Sequence[int]],
    settings: QuantizationSettings,
    write: WritePacked,
    progress: Progress,
) -> tuple[str, ...]:
    """Do as `quantize_by_layers` with a model that is wholly in memory.

    The rows are run as often as needed to keep the products within PRODUCT_BYTES.
    """
    quantizing = _Quantizing(layers, settings, write, progress)
    for part in _parts(layers, PRODUCT_BYTES):
        quantizing.quantize(input_statistics(model, part, rows), in_use=False)
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
