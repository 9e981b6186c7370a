"""Write the quantized model by the recipe's method, and the 16-bit weights in the same pass.

Does: decide which weights are rounded and which are quantized by GPTQ; run GPTQ layer by layer, or
on the whole model where an architecture does not fit.
Does not: quantize (`gptq.py`) or round (`write_weights.py`) by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_ft.export.bit_widths import Bits
from mlx_ft.export.calibration import Layers
from mlx_ft.export.fuse import DTYPES, FusedModel, half_names, quantized_names
from mlx_ft.export.gptq import quantizable_layers, quantize_at_once, quantize_by_layers
from mlx_ft.export.gptq_math import QuantizationSettings
from mlx_ft.export.layerwise import EMBEDDING, HEAD, is_in_layers
from mlx_ft.export.layerwise_models import layerwise_of_fused
from mlx_ft.export.model_folder import begin_folder
from mlx_ft.export.safetensors_writer import WeightsWriter
from mlx_ft.export.write_weights import (
    Observer,
    Rounding,
    packed_names,
    quantized_layouts,
    write_weights,
)
from mlx_ft.recipe.schema import ExportRecipe
from mlx_ft.system.console import Console


@dataclass(frozen=True)
class Quantized:
    """Result of quantizing.

    modules: all quantized modules. half: modules that stay 16-bit, because their rows are not whole
    groups. compensated: the quantized modules that GPTQ did. size_bytes: size of the weights.
    """

    modules: tuple[str, ...]
    half: tuple[str, ...]
    compensated: tuple[str, ...]
    size_bytes: int

    @property
    def half_summary(self) -> str:
        """How many modules stay 16-bit, as text; empty if none do."""
        count = len(self.modules) + len(self.half)
        return f"{len(self.half)} of {count} layers stay 16-bit" if self.half else ""


@dataclass(frozen=True)
class Method:
    """How weights are quantized.

    recipe: method and group size. bits: bits of each module. calibration: rows (ids) for q_method
    gptq. by_layers: run GPTQ one layer at a time; otherwise on the whole model.
    """

    recipe: ExportRecipe
    bits: Bits
    calibration: Sequence[Sequence[int]]
    by_layers: bool


def quantize_into(
    folder: Path,
    fused: FusedModel,
    method: Method,
    half_writer: WeightsWriter | None,
    console: Console,
    observe: Observer | None,
) -> Quantized:
    """Write the weights of a quantized folder, and the 16-bit weights if they have a writer.

    observe: shown the rows that the adapter changed. Raises RunError when the folder is not empty,
    GateFailed when no layer can be quantized, Float16Overflow.
    """
    recipe = method.recipe
    names = quantized_names(fused, recipe.q_group_size)
    layers = _layers_for_gptq(fused, method)
    elsewhere = {f"{name}.weight" for name in layers}
    here = Rounding(method.bits, recipe.q_group_size, set(names) - elsewhere, elsewhere)
    begin_folder(folder)
    layouts = quantized_layouts(fused, names, method.bits, recipe.q_group_size)
    with WeightsWriter(folder, layouts) as writer:
        _write_rounded(fused, half_writer, writer, here, console, observe)
        done = _compensate(fused, layers, method, writer, console) if layers else ()
        left = elsewhere - {f"{name}.weight" for name in done}
        if left:  # no calibration row went through them
            others = fused.weights.keys() - left
            rest = replace(here, rounded=left, elsewhere=others)
            _write_rounded(fused, None, writer, rest, console, None)
        size_bytes = writer.finish()
    half = half_names(fused, recipe.q_group_size)
    return Quantized(_modules(names), _modules(half), done, size_bytes)


def _modules(weights: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.removesuffix(".weight") for name in weights)


def _write_rounded(
    fused: FusedModel,
    half_writer: WeightsWriter | None,
    writer: WeightsWriter,
    rounding: Rounding,
    console: Console,
    observe: Observer | None,
) -> None:
    with console.progress("writing", 1.0) as progress:
        write_weights(fused, half_writer, writer, rounding, progress, observe)


def _layers_for_gptq(fused: FusedModel, method: Method) -> Layers:
    """Return the layers that GPTQ is to quantize; none for q_method round."""
    if method.recipe.q_method != "gptq":
        return {}
    head = HEAD if f"{HEAD}.weight" in fused.weights else EMBEDDING
    return {
        name: layer
        for name, layer in quantizable_layers(fused, method.recipe.q_group_size).items()
        if not method.by_layers or name == head or is_in_layers(name)
    }


def _compensate(
    fused: FusedModel, layers: Layers, method: Method, writer: WeightsWriter, console: Console
) -> tuple[str, ...]:
    """Quantize layers by GPTQ into the writer; return those that calibration rows went through."""
    dtype = DTYPES[str(fused.config["torch_dtype"])]
    bits, group_size = method.bits, method.recipe.q_group_size
    settings = QuantizationSettings(bits.usual, group_size, dtype, bits.raised)
    rows = method.calibration

    def write(name: str, first: int, *arrays: mx.array) -> None:
        for tensor, array in zip(packed_names(f"{name}.weight"), arrays, strict=True):
            writer.write(tensor, first, array)

    with console.progress("quantizing", 1.0) as progress:
        if method.by_layers:
            layerwise = layerwise_of_fused(fused)
            return quantize_by_layers(layerwise, layers, rows, settings, write, progress)
        fused.load("", wide=False)
        done = quantize_at_once(fused.plain, layers, rows, settings, write, progress)
        fused.unload("")
        return done
