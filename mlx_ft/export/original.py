"""Check that the 16-bit original of a quantized base has the same tensors.

Does not: compare their numbers, or tokenizers and templates (`preflight/original.py` does).
"""

from __future__ import annotations

from pathlib import Path

from mlx_ft.errors import Fault, ModelError
from mlx_ft.export.fuse import fuse

SHOWN_FAULTS = 5


def require_same_shapes(base: Path, original: Path) -> None:
    """Raise ModelError with every tensor that is missing in one model or differs in shape.

    Both are compared as mlx-lm loads them, after dequantization.
    """
    ours, theirs = (
        {name: weight.shape for name, weight in fuse(folder, None, "bfloat16").weights.items()}
        for folder in (base, original)
    )
    differences = [
        (name, f"{_shown(theirs.get(name))}, the trained model has {_shown(ours.get(name))}")
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    fix = "name the model that the trained one was quantized from, or leave export.base out"
    faults = [Fault(f"{original}: {name}", found, fix) for name, found in differences]
    if len(faults) > SHOWN_FAULTS:
        found = f"{len(faults) - SHOWN_FAULTS} more tensors differ"
        faults = [*faults[:SHOWN_FAULTS], Fault(str(original), found, fix)]
    if faults:
        raise ModelError(faults)


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"shape {shape}"
