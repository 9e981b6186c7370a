"""survival.json in words: names of the stored forms, and their numbers as text.

Does not: compute or judge survival, escape, or read files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_ft.text import quantities as q
from mlx_ft.text.quantities import written

# Stored forms by their names in survival.json, in the order in which they are shown.
FORMS = ("fused", "quantized", "round-4", "round-5", "round-6", "round-8")
ROUNDED = "round-"
CHOSEN = "quantized"


def forms_of(survival: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the stored forms that were measured, the known ones first and in their order."""
    found = _objects((survival.get("model") or {}).get("ways"))
    names = [name for name in FORMS if name in found]
    return {name: found[name] for name in [*names, *sorted(set(found) - set(names))]}


def layers_of(survival: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the adapted layers, from the model's first to its last."""
    return [layer for layer in survival.get("layers") or [] if isinstance(layer, dict)]


def form_name(form: str, survival: Mapping[str, Any]) -> str:
    """Return the name of a stored form for people: "5-bit, gptq", "4-bit, rounded", "float16"."""
    if form == "fused":
        return written(survival.get("dtype", "16-bit"))
    if form == CHOSEN:
        return f"{bits_name(survival)}, {written(survival.get('method'))}"
    if form.startswith(ROUNDED):
        return f"{form.removeprefix(ROUNDED)}-bit, rounded"
    return written(form)


def bits_name(made: Mapping[str, Any]) -> str:
    """Return the bits of a quantized model: "5-bit", or "4-bit, 12 layers with more"."""
    raised = made.get("raised") or {}
    more = f", {q.plural(len(raised), 'layer')} with more" if raised else ""
    return f"{made.get('bits')}-bit{more}"


def kept_text(value: Any) -> str:
    """Format a survival: 0.9958 -> "99.6 %"; below zero only noise is left."""
    if value is None:
        return "-"
    if not q.is_number(value):
        return str(value)
    return f"{100 * value:.1f} %" if value >= 0 else "< 0"


def nats(value: Any) -> str:
    """Format a divergence in nats with three significant digits."""
    return f"{value:.3g} nats" if q.is_number(value) else "-" if value is None else str(value)


def ratio(value: Any) -> str:
    """Format a ratio of two sizes with three decimals."""
    return f"{value:.3f}" if q.is_number(value) else "-" if value is None else str(value)


def _objects(value: Any) -> dict[str, Mapping[str, Any]]:
    if not isinstance(value, dict):
        return {}
    return {str(name): each for name, each in value.items() if isinstance(each, dict)}
