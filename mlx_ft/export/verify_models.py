"""Open the models of an export and compare them: base, adapter, fused, quantized.

Does: open each as it was written, layer by layer or as a whole; with an original, also the models
that fusing into the trained base would have made.
Does not: compute differences (`verify_logits.py`), or set limits (`verify_checks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_ft.engine.adapters import attach_adapter
from mlx_ft.engine.device import on_cpu
from mlx_ft.engine.load import hold_for_cpu, load_weights, read_lazily, widen_scales
from mlx_ft.export.bit_widths import Bits
from mlx_ft.export.fuse import DTYPES, FusedModel, fuse, quantized_names
from mlx_ft.export.layerwise_models import layerwise_of_folder, layerwise_of_fused
from mlx_ft.export.survival.audit import Passages, rounded_models
from mlx_ft.export.survival.measures import Divergence
from mlx_ft.export.verify_checks import Check, check_fused, check_quantized
from mlx_ft.export.verify_logits import Comparison, Difference, compare_layerwise, compare_whole
from mlx_ft.export.write_weights import Rounding, rounded
from mlx_ft.recipe.names import ADAPTER, BASE, FUSED, QUANTIZED
from mlx_ft.system.console import Progress

# With an original: the trained model, and the same fused into the trained base, and rounded.
TRAINED, TRAINED_FUSED, TRAINED_ROUNDED = "trained", "trained, fused", "trained, rounded"


@dataclass(frozen=True)
class Steps:
    """The models that an export read and made.

    base: the trained base. adapter: its adapter. original: the 16-bit original that was fused into
    (None: the base). fused: the fused model. fused_folder: its folder (None: not written).
    small_folder: folder of the quantized model. bits, group_size: how it is quantized.
    """

    base: Path
    adapter: Path
    original: Path | None
    fused: FusedModel
    fused_folder: Path | None
    small_folder: Path
    bits: Bits
    group_size: int

    @property
    def into(self) -> Path:
        """The folder that the adapter was fused into."""
        return self.base if self.original is None else self.original


@dataclass(frozen=True)
class Compared:
    """Result of the comparison.

    checks: the check of each step. from_adapter: passages ("held_out", "prompts") -> model ->
    divergence from the adapter. positions: passages -> number of positions compared. original: how
    far fusing into the original and into the trained base are from the trained model, as JSON
    (None: no original). lines: the same as text.
    """

    checks: tuple[Check, ...]
    from_adapter: Mapping[str, Mapping[str, Divergence]]
    positions: Mapping[str, int]
    original: dict[str, Any] | None
    lines: tuple[str, ...]


# A folder and its adapter (None: no adapter), or a fused model that is in no folder.
_Source = tuple[Path, Path | None] | FusedModel


def compare_models(
    steps: Steps,
    passages: Passages,
    by_layers: bool,
    progress: Progress,
) -> Compared:
    """Compare each model with the one before, and all with the adapter. Reports the share done.

    Models that are rounded for comparison are only opened `by_layers`: compared as wholes, the
    logits of every model would have to stay in memory.
    """
    fused: _Source = steps.fused if steps.fused_folder is None else (steps.fused_folder, None)
    sources: dict[str, _Source] = {
        BASE: (steps.into, None),
        ADAPTER: (steps.into, steps.adapter),
        FUSED: fused,
        QUANTIZED: (steps.small_folder, None),
    }
    dtype = str(steps.fused.config["torch_dtype"])
    if by_layers:
        rounding = rounded_models(steps.into, steps.adapter, dtype, steps.group_size)
        sources |= {name: opened() for name, opened in rounding.items()}
    pairs = [(FUSED, QUANTIZED), *((ADAPTER, name) for name in sources if name != ADAPTER)]
    if steps.original is not None:
        sources |= _trained_sources(steps)
        others = (FUSED, QUANTIZED, TRAINED_FUSED, TRAINED_ROUNDED)
        pairs += [(TRAINED, each) for each in others]
    if by_layers:
        models = {name: _opening(source) for name, source in sources.items()}
        comparison = compare_layerwise(models, pairs, passages.rows, progress)
    else:
        comparison = _compared_whole(sources, pairs, passages.rows, progress)
    found = comparison.differences(comparison.prompt_of < len(passages.held_out))
    checks = (
        check_fused(found[ADAPTER, FUSED], found[ADAPTER, BASE], DTYPES[dtype]),
        check_quantized(found[FUSED, QUANTIZED], steps.bits),
    )
    audited = _from_adapter(comparison, passages)
    if steps.original is None:
        return Compared(checks, *audited, None, ())
    return Compared(checks, *audited, *_original_compared(steps, found))


def _from_adapter(
    comparison: Comparison, passages: Passages
) -> tuple[dict[str, dict[str, Divergence]], dict[str, int]]:
    """Return passages -> model -> divergence from the adapter, and passages -> positions."""
    chosen = passages.chosen(comparison.prompt_of)
    found = {}
    for name, here in chosen.items():
        differences = comparison.differences(here) if here.any() else {}
        found[name] = {
            other: Divergence(each.divergence, each.flips)
            for (reference, other), each in differences.items()
            if reference == ADAPTER
        }
    return found, {name: int(here.sum()) for name, here in chosen.items()}


def _trained_sources(steps: Steps) -> dict[str, _Source]:
    """Return the trained model, and the same fused into the trained base, and rounded."""
    dtype = str(steps.fused.config["torch_dtype"])
    fused = fuse(steps.base, steps.adapter, dtype)
    names = quantized_names(fused, steps.group_size)
    apart = fuse(steps.base, steps.adapter, dtype)
    return {
        TRAINED: (steps.base, steps.adapter),
        TRAINED_FUSED: fused,
        TRAINED_ROUNDED: rounded(apart, Rounding(steps.bits, steps.group_size, names)),
    }


def _opening(source: _Source) -> Callable[[], Any]:
    if isinstance(source, FusedModel):
        return lambda: layerwise_of_fused(source)
    return lambda: layerwise_of_folder(*source)


def _compared_whole(
    sources: Mapping[str, _Source],
    pairs: Sequence[tuple[str, str]],
    prompts: Sequence[Sequence[int]],
    progress: Progress,
) -> Comparison:
    def loading(source: _Source) -> Callable[[], nn.Module]:
        def load() -> nn.Module:
            if isinstance(source, FusedModel):
                source.load("", wide=False)
                return source.plain
            model = _as_its_numbers_say(source[0])
            if source[1] is not None:
                attach_adapter(model, source[1])
            return model

        return load

    models = {name: loading(source) for name, source in sources.items()}
    found = compare_whole(models, pairs, prompts, progress)
    for source in sources.values():
        if isinstance(source, FusedModel):
            source.unload("")
    return found


def _as_its_numbers_say(folder: Path) -> nn.Module:
    """Return a model whose weights, once its activations are float32, are used without rounding.

    On a GPU it stays as stored. A CPU has no fast product with quantized weights: they are
    expanded.
    """
    if not on_cpu():
        return load_weights(folder)[0]
    model, _ = read_lazily(folder)
    model.eval()
    return hold_for_cpu(widen_scales(model))


def _original_compared(
    steps: Steps, found: Mapping[tuple[str, str], Difference]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return how far two exports are from the trained model, as JSON and as text.

    One is the export that was made, the other the export that fusing into the trained base gives.
    """
    exports = {
        "into the original": (FUSED, QUANTIZED),
        "into the trained base": (TRAINED_FUSED, TRAINED_ROUNDED),
    }
    info = {
        place: {
            "fused": asdict(found[TRAINED, half]),
            "quantized": asdict(found[TRAINED, small]),
        }
        for place, (half, small) in exports.items()
    }
    lines = [
        f"fused {place}: {found[TRAINED, half].divergence:.4f} nats from the trained model, in "
        f"{steps.bits} bits {found[TRAINED, small].divergence:.4f}"
        for place, (half, small) in exports.items()
    ]
    return {"path": str(steps.original), "from_trained": info}, tuple(lines)
