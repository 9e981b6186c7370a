"""Survival audit: how much of the training each adapted layer keeps, in each stored form.

Does: read a layer's rows before and after training, as stored and as rounded to 4, 5, 6 and 8 bits;
collect its inputs on held-out rows; open the rounded models for comparison.
Does not: compute the sums (`measures.py`), compare models (`export/verify_models.py`), or judge
(`verdict.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_ft.data.tokens import group_rows, pad_rows
from mlx_ft.export.bit_widths import Bits
from mlx_ft.export.calibration import InputStatistics, watching
from mlx_ft.export.fuse import FusedModel, Weight, fuse, quantized_names
from mlx_ft.export.layerwise import LayerwiseModel, layer_prefix
from mlx_ft.export.layerwise_models import layerwise_of_fused
from mlx_ft.export.safetensors_writer import flat_rows
from mlx_ft.export.survival.measures import Floats, LayerAudit, Rows, audit_layer
from mlx_ft.export.write_weights import Rounding, rounded
from mlx_ft.recipe.names import FUSED, QUANTIZED
from mlx_ft.recipe.schema import Q_BITS
from mlx_ft.system.console import Progress

# Positions at which a layer's inputs are kept, drawn evenly from the trained positions of held-out
# rows. The inputs take 7 MB for the widest layer of a model of 14B parameters.
INPUT_POSITIONS = 128
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Passages:
    """Rows and prompts on which models are compared.

    held_out: validation rows (ids). trained: of each, the positions that predict a trained token.
    prompts: prompts of suites (ids).
    """

    held_out: Sequence[Sequence[int]]
    trained: Sequence[Sequence[int]]
    prompts: Sequence[Sequence[int]] = ()

    @property
    def rows(self) -> list[Sequence[int]]:
        """All rows, the held-out rows first."""
        return [*self.held_out, *self.prompts]

    def chosen(self, row_of: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.bool_]]:
        """Return masks of positions: `held_out` ones that predict a trained token, and `prompts`.

        row_of: the row of each position; a row's positions are in their order.
        """
        held_out = np.zeros(len(row_of), bool)
        for row, places in enumerate(self.trained):
            held_out[np.flatnonzero(row_of == row)[list(places)]] = True
        return {"held_out": held_out, "prompts": row_of >= len(self.held_out)}


def rounded_name(bits: int) -> str:
    """Return the name of the form that is rounded to `bits`, weight by weight."""
    return f"round-{bits}"


def rounded_models(
    into: Path, adapter: Path, dtype: str, group_size: int
) -> dict[str, Callable[[], FusedModel]]:
    """Return form -> how to open the fused model rounded to so many bits; it is never written."""

    def opening(bits: int) -> Callable[[], FusedModel]:
        def opened() -> FusedModel:
            fused = fuse(into, adapter, dtype)
            names = quantized_names(fused, group_size)
            return rounded(fused, Rounding(Bits(bits), group_size, names))

        return opened

    return {rounded_name(bits): opening(bits) for bits in Q_BITS}


@dataclass(frozen=True)
class Stored:
    """The models that layers are read from.

    fused: the fused model, with base and delta. small_folder: folder of the quantized model.
    """

    fused: FusedModel
    small_folder: Path
    group_size: int


def audit_layers(
    stored: Stored,
    passages: Passages,
    by_layers: bool,
    progress: Progress,
) -> list[LayerAudit]:
    """Return the audit of each adapted layer, with one layer's weights and inputs in memory.

    Its inputs are those of the fused model. Experts are audited without inputs, as are all layers
    of a model that does not run `by_layers`. Reports to `progress` the share of audited layers.
    """
    fused = stored.fused
    dtype = str(fused.config["torch_dtype"])
    small = fuse(stored.small_folder, None, dtype).weights
    left = {
        weight.module: weight
        for weight in fused.weights.values()
        if weight.fuse is not None and weight.takes_bits
    }
    total, audits = len(left), []

    def audit(weight: Weight, inputs: Floats | None) -> None:
        audits.append(_audited(weight, small[weight.name], stored.group_size, inputs))
        done = len(audits)
        progress.update(done / total, f"layer {done} of {total}")

    for inputs in _inputs_by_layer(fused, left, passages) if by_layers else ():
        for module in [name for name in left if name in inputs]:
            audit(left.pop(module), inputs[module])
    for weight in left.values():
        audit(weight, None)
    order = {weight.module: place for place, weight in enumerate(fused.weights.values())}
    return sorted(audits, key=lambda audit: order[audit.name])


def _audited(weight: Weight, small: Weight, group_size: int, inputs: Floats | None) -> LayerAudit:
    fuse_rows = weight.fuse
    assert fuse_rows is not None, "only adapted layers are audited"
    whole_groups = weight.shape[-1] % group_size == 0

    def half(first: int, end: int) -> mx.array:
        return weight.half_rows(first, end)

    def in_bits(bits: int) -> Rows:
        def rows(first: int, end: int) -> Floats:
            if not whole_groups:
                return _numbers(half(first, end))
            packed, scales, biases = mx.quantize(half(first, end), group_size, bits)
            wide = (scales.astype(mx.float32), biases.astype(mx.float32))
            return _numbers(mx.dequantize(packed, *wide, group_size, bits))

        return rows

    forms: Mapping[str, Rows] = {
        FUSED: lambda first, end: _numbers(half(first, end)),
        QUANTIZED: lambda first, end: _numbers(small.base(first, end)),
        **{rounded_name(bits): in_bits(bits) for bits in Q_BITS},
    }
    audit = audit_layer(
        weight.module,
        (flat_rows(weight.shape), weight.shape[-1]),
        lambda first, end: _numbers(weight.base(first, end)),
        lambda first, end: _numbers(weight.rows(first, end)),
        forms,
        inputs,
    )
    weight.forget()
    small.forget()
    mx.clear_cache()
    return audit


def _numbers(rows: mx.array) -> Floats:
    return np.array(rows.astype(mx.float32))


class _InputSamples(InputStatistics):
    """Inputs of layers at some positions, kept themselves instead of their products."""

    def see(self, name: str, inputs: mx.array) -> None:
        """Keep the inputs of a layer."""
        tokens = inputs.reshape(-1, inputs.shape[-1])[self.positions].astype(mx.float32)
        held = self.products.get(name)
        self.products[name] = tokens if held is None else mx.concatenate([held, tokens])


def _inputs_by_layer(
    fused: FusedModel, modules: Collection[str], passages: Passages
) -> Iterator[dict[str, Floats]]:
    """Yield, layer by layer, the inputs (N, inputs) of those of `modules` that are in it."""
    rows, places = passages.held_out, _spread(passages.trained, INPUT_POSITIONS)
    groups = [list(group) for group in group_rows(list(map(len, rows)), BATCH_TOKENS)]
    batches = [mx.array(pad_rows([rows[index] for index in group])) for group in groups]
    wanted = [
        mx.array(
            [at * batch.shape[1] + p for at, i in enumerate(group) for p in places[i]], mx.int32
        )
        for group, batch in zip(groups, batches, strict=True)
    ]
    layerwise = layerwise_of_fused(fused)
    for index, watched in _watched_layers(layerwise, modules, batches, wanted):
        prefix = layer_prefix(index)
        yield {
            name: _numbers(tokens) for name, tokens in watched.items() if name.startswith(prefix)
        }


def _watched_layers(
    layerwise: LayerwiseModel,
    modules: Collection[str],
    batches: Sequence[mx.array],
    wanted: Sequence[mx.array],
) -> Iterator[tuple[int, dict[str, mx.array]]]:
    """Yield a layer's number and its modules' inputs at the `wanted` positions, layer by layer."""
    parts, _ = layerwise.one_by_one()
    states: list[mx.array | None] = [None] * len(batches)
    adapted = [index for index in range(len(parts)) if _has_any(modules, layer_prefix(index))]
    for index, part in enumerate(parts[: max(adapted, default=-1) + 1]):
        layerwise.load(index)
        here = {
            name: module
            for name, module in layerwise.model.named_modules()
            if name in modules
            and name.startswith(layer_prefix(index))
            and type(module) is nn.Linear
        }
        with watching(layerwise.model, here, _InputSamples()) as seen:
            for place, (ids, positions) in enumerate(zip(batches, wanted, strict=True)):
                seen.begin(positions)
                states[place] = part(ids, states[place])
                mx.eval(states[place], seen.products)
        layerwise.unload(index)
        if here:
            yield index, dict(seen.products)


def _has_any(modules: Collection[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in modules)


def _spread(places: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Return at most `most` of the places of all rows, drawn evenly."""
    flat = [(row, place) for row, each in enumerate(places) for place in each]
    step = max(1, -(-len(flat) // most))
    kept: list[list[int]] = [[] for _ in places]
    for row, place in flat[::step]:
        kept[row].append(place)
    return kept
