"""Write the 16-bit and the quantized weights in one pass; each part of rows is computed once.

Does: lay out both folders, round, write both; compute the next rows while these are written.
Does not: compensate for rounding errors (`gptq.py`), or write anything but weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_ft.engine.device import on_cpu
from mlx_ft.export.bit_widths import Bits
from mlx_ft.export.fuse import FusedModel, Weight
from mlx_ft.export.safetensors_writer import Layout, WeightsWriter
from mlx_ft.system.console import Progress

# Streams that compute at the same time on a CPU; as many parts are in memory.
CPU_STREAMS = 2

# Takes (weight, first row, the base's rows, the fused rows); rows are in float32.
Observer = Callable[[Weight, int, mx.array, mx.array], None]


def half_layouts(fused: FusedModel) -> dict[str, Layout]:
    """Return the tensors of the 16-bit folder."""
    return {name: Layout(weight.shape, weight.dtype) for name, weight in fused.weights.items()}


def quantized_layouts(
    fused: FusedModel, quantized: Collection[str], bits: Bits, group_size: int
) -> dict[str, Layout]:
    """Return the tensors of the quantized folder: `quantized` weights have scales and biases."""
    layouts: dict[str, Layout] = {}
    for name, weight in fused.weights.items():
        if name not in quantized:
            layouts[name] = Layout(weight.shape, weight.dtype)
            continue
        *outer, inputs = weight.shape
        groups = Layout((*outer, inputs // group_size), weight.dtype)
        packed = Layout((*outer, inputs * bits.of(weight.module) // 32), mx.uint32)
        tensors = zip(packed_names(name), (packed, groups, groups), strict=True)
        layouts.update(tensors)
    return layouts


def packed_names(name: str) -> tuple[str, str, str]:
    """Return the names of a quantized weight's tensors: codes, scales, biases."""
    module = name.removesuffix("weight")
    return name, f"{module}scales", f"{module}biases"


@dataclass(frozen=True)
class Rounding:
    """How the quantized folder is written.

    rounded: weights that are rounded in this pass. elsewhere: weights that GPTQ writes. All other
    weights stay in 16 bits.
    """

    bits: Bits
    group_size: int
    rounded: Collection[str]
    elsewhere: Collection[str] = ()


@dataclass(frozen=True)
class _Part:
    """Rows of a weight that are being computed.

    wide: the base's rows and the fused rows in float32, if there is an observer. half: the fused
    rows in 16 bits. packed: codes, scales and biases; empty if the weight is not rounded here.
    """

    weight: Weight
    first: int
    end: int
    wide: tuple[mx.array, mx.array] | None
    half: mx.array
    packed: Sequence[mx.array]


def write_weights(
    fused: FusedModel,
    half_writer: WeightsWriter | None,
    small_writer: WeightsWriter,
    rounding: Rounding,
    progress: Progress,
    observe: Observer | None = None,
) -> None:
    """Write the 16-bit weights, if there is a writer for them, and the quantized weights.

    Reports to `progress` after each part: done is the share of all numbers. observe: shown the rows
    that the adapter changed. Raises Float16Overflow.
    """
    wanted = [
        weight
        for name, weight in fused.weights.items()
        if half_writer is not None or observe is not None or name not in rounding.elsewhere
    ]
    total = max(1, sum(_numbers(weight) for weight in wanted))
    done = 0
    for part in _computed(_begun(wanted, rounding, observe is not None)):
        weight = part.weight
        weight.require_finite(part.first, part.end, part.half)
        if part.wide is not None and observe is not None:
            observe(weight, part.first, *part.wide)
        if half_writer is not None:
            half_writer.write(weight.name, part.first, part.half)
        if part.packed:
            for name, array in zip(packed_names(weight.name), part.packed, strict=True):
                small_writer.write(name, part.first, array)
        elif weight.name not in rounding.elsewhere:
            small_writer.write(weight.name, part.first, part.half)
        if part.end == weight.ranges[-1][1]:
            weight.forget()
        done += int(part.half.size)
        text = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} million weights"
        progress.update(done / total, text)
    mx.clear_cache()


def _numbers(weight: Weight) -> int:
    return Layout(weight.shape, mx.uint8).size_bytes


def _begun(weights: Sequence[Weight], rounding: Rounding, both: bool) -> Iterator[_Part]:
    """Yield every part of every weight, not computed yet.

    both: keep the float32 rows of the base and of the fused model too.
    """
    for weight in weights:
        for first, end in weight.ranges:
            wide = None
            if both and weight.fuse is not None:
                base = weight.base(first, end)
                wide = (base, weight.fuse(first, end, base))
                half = wide[1].astype(weight.dtype)
            else:
                half = weight.half_rows(first, end)
            packed: Sequence[mx.array] = ()
            if weight.name in rounding.rounded:
                packed = mx.quantize(half, rounding.group_size, rounding.bits.of(weight.module))
            yield _Part(weight, first, end, wide, half, packed)


def _computed(parts: Iterator[_Part]) -> Iterator[_Part]:
    """Yield computed parts in order, while the next ones are being computed."""
    device = mx.default_device()
    streams = [mx.new_stream(device) for _ in range(CPU_STREAMS if on_cpu() else 1)]
    waiting: deque[_Part] = deque()
    turn = 0
    while True:
        with mx.stream(streams[turn % len(streams)]):
            part = next(parts, None)
        if part is not None:
            turn += 1
            arrays = (part.half, *(part.wide or ()), *part.packed)
            mx.async_eval(*arrays)  # type: ignore[no-untyped-call]  # mlx types eval alone
            waiting.append(part)
        if not waiting:
            return
        if part is None or len(waiting) >= max(2, len(streams)):
            ready = waiting.popleft()
            mx.eval(ready.half, *(ready.wide or ()), *ready.packed)
            yield ready
            del ready
            mx.clear_cache()


def rounded(fused: FusedModel, rounding: Rounding) -> FusedModel:
    """Return a fused model with rounded weights, without writing it."""

    def after(weight: Weight) -> Weight:
        bits = rounding.bits.of(weight.module)

        def rows(first: int, end: int) -> mx.array:
            half = weight.half_rows(first, end)
            packed, scales, biases = mx.quantize(half, rounding.group_size, bits)
            wide = (scales.astype(mx.float32), biases.astype(mx.float32))
            return mx.dequantize(packed, *wide, rounding.group_size, bits)

        # A quantized folder's layers are expanded to float32 too: the same numbers, to the bit.
        return replace(weight, base=rows, fuse=None, dtype=mx.float32)

    weights = {
        name: after(weight) if name in rounding.rounded else weight
        for name, weight in fused.weights.items()
    }
    return replace(fused, weights=weights)
