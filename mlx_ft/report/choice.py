"""Which checkpoint and seed were chosen, and why, in words and as a table. Does not choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_ft.report.tables import Cell, Table, table
from mlx_ft.text import quantities as q
from mlx_ft.text.safe import one_line


def selected_by(document: Mapping[str, Any]) -> str | None:
    """Return the metric that chose the weights, or None for the last weights."""
    recipe = ((document["recipe"] or {}).get("values") or {}).get("train") or {}
    select = recipe.get("select")
    if not isinstance(select, dict):
        return None
    metric = select.get("metric")
    return str(metric) if metric else ("mean" if select.get("suite") else None)


def chosen_words(info: Mapping[str, Any], by: str) -> str:
    """Return the chosen iteration and the metric that chose it, on one line."""
    score = info.get("chosen_score")
    reason = f"{by} {q.score(score)}, " if q.is_number(score) else ""
    early = "; nothing got better any more" if info.get("ended_early") else ""
    return (
        f"iteration {q.count(info.get('chosen_iteration'))} of {q.count(info.get('iterations'))} "
        f"({reason}validation loss {q.loss(info.get('chosen_validation_loss'))}){early}"
    )


def seeds_words(seeds: Mapping[str, Any]) -> str:
    """Return the spread of the seeds, and how many reached the gate, on one line."""
    spread, reached = seeds.get("spread") or {}, seeds.get("reached")
    measure = str(spread.get("measure", "")).replace("_", " ")
    form = q.score if spread.get("measure") == "score" else q.loss
    parts = [
        f"{len(seeds.get('trained') or [])} trained, {seeds.get('chosen')} chosen",
        f"{measure} {form(spread.get('low'))} to {form(spread.get('high'))}, "
        f"mean {form(spread.get('mean'))}",
    ]
    if isinstance(reached, dict):
        parts.append(reached_words(reached))
    return "; ".join(parts)


def reached_words(reached: Mapping[str, Any]) -> str:
    """Return how many seeds learned the task, with the interval of its probability."""
    share = reached["count"] / reached["of"] if reached.get("of") else None
    return (
        f"{reached.get('count')} of {reached.get('of')} reached {reached.get('gate')} "
        "on the prompts that choose: "
        f"{q.share(share)}, 95 % interval {q.interval(reached.get('low'), reached.get('high'))}"
    )


def seed_table(seeds: Mapping[str, Any]) -> Table:
    """Return the result of each seed."""
    rows: list[list[str | Cell]] = []
    for entry in seeds.get("trained") or []:
        stopped = entry.get("stopped")
        tone = {True: "ok", False: "fail"}.get(entry.get("reached"), "")
        chosen = "chosen" if entry.get("seed") == seeds.get("chosen") else ""
        reason = one_line(str(stopped), 200) if stopped else ""
        steps = f"{q.count(entry.get('iteration'))} of {q.count(entry.get('iterations'))}"
        rows.append(
            [
                Cell(str(entry.get("seed")), note=chosen),
                Cell("stopped", reason, "fail")
                if stopped
                else Cell(q.score(entry.get("score")), tone=tone),
                q.loss(entry.get("validation_loss")),
                "" if stopped else steps,
                q.format_seconds(entry.get("seconds")),
            ]
        )
    head = ("seed", "score", "validation loss", "weights of iteration", "time")
    return table("Seeds: the same recipe, started and shuffled otherwise", head, rows, range(1, 5))
