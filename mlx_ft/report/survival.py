"""Survival tables and curves: survival.json as rows of text.

Does not: compute, judge, escape or read files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlx_ft.export.survival.words import (
    CHOSEN,
    _objects,
    form_name,
    forms_of,
    kept_text,
    layers_of,
    nats,
    ratio,
)
from mlx_ft.report.tables import Cell, Row, Table, table
from mlx_ft.text import quantities as q
from mlx_ft.text.quantities import written


def way_table(survival: Mapping[str, Any]) -> Table:
    """Return the survival of each way of storing the model."""
    limit = survival.get("min_survival")
    rows: list[Row] = []
    for name, way in forms_of(survival).items():
        kept = way.get("survival")
        tone = ""
        if q.is_number(kept) and q.is_number(limit):
            tone = "ok" if kept >= limit else "fail"
        worst = _worst_layer(survival, name)
        rows.append(
            [
                Cell(form_name(name, survival), "the final model" if name == CHOSEN else ""),
                Cell(kept_text(kept), tone=tone if name in ("fused", CHOSEN) else ""),
                nats(way.get("nats")),
                q.share(way.get("flips")),
                nats(way.get("prompt_nats")),
                q.share(way.get("prompt_flips")),
                worst,
            ]
        )
    head = (
        "stored as",
        "survival",
        "KL, held-out rows",
        "other token",
        "KL, prompts",
        "other token",
        "worst layer",
    )
    learned = nats((survival.get("model") or {}).get("learned_nats"))
    limit_text = f"at least {kept_text(limit)} wanted" if q.is_number(limit) else "no limit is set"
    caption = (
        f"What is left of what training changed ({learned} from base to adapter, where held-out "
        f"rows were trained); {limit_text}; rounded: each weight by itself"
    )
    return table(caption, head, rows, range(1, 7))


def layer_table(survival: Mapping[str, Any]) -> Table:
    """Return |delta|/|W|, gain and noise of every adapted layer, and survival side by side."""
    names = list(forms_of(survival))
    rows: list[Row] = []
    for layer in layers_of(survival):
        kept = _objects(layer.get("kept"))
        chosen = kept.get(CHOSEN, {})
        rows.append(
            [
                written(layer.get("name")).removeprefix("model.layers."),
                q.count(layer.get("bits")),
                q.share(layer.get("delta_over_weight")),
                ratio(chosen.get("gain")),
                ratio(chosen.get("noise")),
                *(kept_text(kept.get(name, {}).get("survival")) for name in names),
            ]
        )
    head = ("layer", "bits", "delta / W", "gain", "noise", *(form_name(n, survival) for n in names))
    caption = (
        "Each adapted layer: gain and noise of the final weights, in sizes of the delta; then the "
        "survival of what the layer gives out, stored in each way"
    )
    return table(caption, head, rows, range(1, len(head)))


def layer_curves(survival: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Return name of a way -> (number of the layer, the worst survival of its parts), for a
    chart.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for name in forms_of(survival):
        worst: dict[int, float] = {}
        for layer in layers_of(survival):
            number = re.search(r"\.(\d+)\.", str(layer.get("name")))
            kept = _objects(layer.get("kept")).get(name, {}).get("survival")
            if number and q.is_number(kept):
                worst[int(number[1])] = min(kept, worst.get(int(number[1]), kept))
        if worst:
            found[form_name(name, survival)] = sorted(worst.items())
    return found


def survival_rows(survival: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the terminal's table: way, survival, divergence, flips, worst layer."""
    return [
        [
            form_name(name, survival) + (" *" if name == CHOSEN else ""),
            kept_text(way.get("survival")),
            nats(way.get("nats")),
            q.share(way.get("flips")),
            nats(way.get("prompt_nats")),
            _worst_layer(survival, name),
        ]
        for name, way in forms_of(survival).items()
    ]


SURVIVAL_HEAD = ("stored as", "survival", "KL held out", "flips", "KL prompts", "worst layer")


def _worst_layer(survival: Mapping[str, Any], way: str) -> str:
    kept = [_objects(layer.get("kept")).get(way, {}) for layer in layers_of(survival)]
    numbers = [each["survival"] for each in kept if q.is_number(each.get("survival"))]
    return kept_text(min(numbers)) if numbers else "-"
