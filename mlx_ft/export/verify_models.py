"""The models of an export beside each other: adapter, fused, quantized, and both ways of fusing.

Does: open each of them as it was written, layer by layer or as a whole, and have them compared.
Does not: compute what they differ by (`verify_logits.py`), or set limits (`verify_checks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_ft.engine.adapters import attach_adapter
from mlx_ft.engine.load import load_weights
from mlx_ft.export.bit_widths import Bits
from mlx_ft.export.fuse import FusedModel, fuse, quantized_names
from mlx_ft.export.layerwise_models import lane_of_folder, lane_of_fused
from mlx_ft.export.survival.audit import Passages, rounded_models
from mlx_ft.export.survival.measures import Divergence
from mlx_ft.export.verify_checks import Check, check_fused, check_quantized
from mlx_ft.export.verify_logits import Comparison, Difference, compare_lanes, compare_whole
from mlx_ft.export.write_weights import Rounding, rounded
from mlx_ft.recipe.names import ADAPTER, BASE, FUSED, QUANTIZED

# With another base than the trained one: what was trained, and what it would be fused and rounded.
TRAINED, TRAINED_FUSED, TRAINED_ROUNDED = "trained", "trained, fused", "trained, rounded"


@dataclass(frozen=True)
class Steps:
    """What an export went through: `original` is what was fused into, if not the trained base;
    `fused_folder` is None where the 16-bit model was not written.
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
        return self.base if self.original is None else self.original


@dataclass(frozen=True)
class Compared:
    """Checks of each step; what base and each way of storing the model differ from the adapter by,
    on held-out rows where they were trained, and on prompts; with an original, both ways of fusing:
    as JSON, and in words.
    """

    checks: tuple[Check, ...]
    from_adapter: Mapping[str, Mapping[str, Divergence]]
    positions: Mapping[str, int]
    both_ways: dict[str, Any] | None
    lines: tuple[str, ...]


# A folder with an adapter or none, or a fused model that is in no folder.
_Source = tuple[Path, Path | None] | FusedModel


def compare_models(
    steps: Steps,
    passages: Passages,
    by_layers: bool,
    on_step: Callable[[float], None],
) -> Compared:
    """Compare each model with the one before, and all with the adapter; `on_step` hears the share
    done.

    Models that are rounded for comparison are only opened `by_layers`: as wholes they would all
    have to keep their logits.
    """
    fused: _Source = steps.fused if steps.fused_folder is None else (steps.fused_folder, None)
    sources: dict[str, _Source] = {
        BASE: (steps.into, None),
        ADAPTER: (steps.into, steps.adapter),
        FUSED: fused,
        QUANTIZED: (steps.small_folder, None),
    }
    if by_layers:
        dtype = str(steps.fused.config["torch_dtype"])
        rounding = rounded_models(steps.into, steps.adapter, dtype, steps.group_size)
        sources |= {name: opened() for name, opened in rounding.items()}
    pairs = [(FUSED, QUANTIZED), *((ADAPTER, name) for name in sources if name != ADAPTER)]
    if steps.original is not None:
        sources |= _trained_sources(steps)
        ways = (FUSED, QUANTIZED, TRAINED_FUSED, TRAINED_ROUNDED)
        pairs += [(TRAINED, each) for each in ways]
    if by_layers:
        lanes = {name: _opening(source) for name, source in sources.items()}
        comparison = compare_lanes(lanes, pairs, passages.rows, on_step)
    else:
        comparison = _compared_whole(sources, pairs, passages.rows, on_step)
    found = comparison.differences(comparison.prompt_of < len(passages.held_out))
    checks = (
        check_fused(found[ADAPTER, FUSED]),
        check_quantized(found[FUSED, QUANTIZED], steps.bits),
    )
    audited = _from_adapter(comparison, passages)
    if steps.original is None:
        return Compared(checks, *audited, None, ())
    return Compared(checks, *audited, *_both_ways(steps, found))


def _from_adapter(
    comparison: Comparison, passages: Passages
) -> tuple[dict[str, dict[str, Divergence]], dict[str, int]]:
    """Return what models differ from the adapter by, and at how many positions, by passages."""
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
        return lambda: lane_of_fused(source)
    return lambda: lane_of_folder(*source)


def _compared_whole(
    sources: Mapping[str, _Source],
    pairs: Sequence[tuple[str, str]],
    prompts: Sequence[Sequence[int]],
    on_step: Callable[[float], None],
) -> Comparison:
    def loading(source: _Source) -> Callable[[], nn.Module]:
        def load() -> nn.Module:
            if isinstance(source, FusedModel):
                source.load("", wide=False)
                return source.plain
            model, _, _ = load_weights(source[0])
            if source[1] is not None:
                attach_adapter(model, source[1])
            return model

        return load

    models = {name: loading(source) for name, source in sources.items()}
    found = compare_whole(models, pairs, prompts, on_step)
    for source in sources.values():
        if isinstance(source, FusedModel):
            source.unload("")
    return found


def _both_ways(
    steps: Steps, found: Mapping[tuple[str, str], Difference]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return how far the model that was made, and the one that fusing into the trained base would
    have made, are from the model that was trained.
    """
    ways = {
        "into the original": (FUSED, QUANTIZED),
        "into the trained base": (TRAINED_FUSED, TRAINED_ROUNDED),
    }
    info = {
        way: {
            "fused": asdict(found[TRAINED, half]),
            "quantized": asdict(found[TRAINED, small]),
        }
        for way, (half, small) in ways.items()
    }
    lines = [
        f"fused {way}: {found[TRAINED, half].divergence:.4f} nats from the trained model, in "
        f"{steps.bits} bits {found[TRAINED, small].divergence:.4f}"
        for way, (half, small) in ways.items()
    ]
    return {"path": str(steps.original), "from_trained": info}, tuple(lines)
