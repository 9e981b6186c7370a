"""One sentence on how a run ended, with its evidence, and the next step.

The HTML report and the terminal both open with it. It quotes recorded numbers and judges nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_ft.runs.document import is_report, ordered_columns
from mlx_ft.text.quantities import loss, plural, score
from mlx_ft.text.safe import one_line

TITLES = {
    "done": ("Done", "ok"),
    "gate_failed": ("Stopped by a gate", "fail"),
    "failed": ("Failed", "fail"),
    "interrupted": ("Interrupted", "warn"),
    "stopped": ("Ended early, as asked", "warn"),
    "running": ("Running, as last recorded", "warn"),
}
ABSENCE = {
    "done": "not part of this run",
    "gate_failed": "the run was stopped before it",
    "failed": "the run failed before it was finished",
    "interrupted": "the run was interrupted before it was finished",
    "stopped": "the run was asked to end before it",
    "running": "not finished yet",
}


@dataclass(frozen=True)
class Verdict:
    """How a run ended: a `title`, its `tone` (ok, warn, fail) and one sentence of `evidence`."""

    title: str
    tone: str
    evidence: str


def verdict(document: Mapping[str, Any]) -> Verdict:
    """Return the verdict on a run's document."""
    status = str(document["status"])
    title, tone = TITLES.get(status, ("Status not recorded", "warn"))
    reason = document["timings"]["exit_reason"]
    told = reason and status not in ("done", "running") and reason != status
    parts = [one_line(str(reason), 400)] if told else []
    scores = score_changes(document)
    if scores:
        parts.append(scores)
    elif status in ("interrupted", "failed", "running"):
        parts.append(progress(document))
    elif status == "done":
        parts.append("no evaluation suite was measured")
    return Verdict(title, tone, "; ".join(part for part in parts if part))


def expectations(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the recipe's hypothesis and expectation, if given."""
    values = (document["recipe"] or {}).get("values") or {}
    return [(key, str(values[key])) for key in ("hypothesis", "expected") if values.get(key)]


def absence(document: Mapping[str, Any], what: str) -> str:
    """Return the sentence that stands where an artifact is missing."""
    return f"No {what}: {ABSENCE.get(str(document['status']), 'not in this folder')}."


def score_changes(document: Mapping[str, Any]) -> str:
    """Return "suite first -> last" for every suite, or "" when nothing was measured."""
    sentences: dict[str, list[str]] = {}
    for suite, columns in (document["eval"] or {}).items():
        names = ordered_columns(columns)
        if not names:
            continue
        first, last = names[0], names[-1]
        means = [score(columns[name].get("mean")) for name in dict.fromkeys((first, last))]
        measured = " to ".join(dict.fromkeys((first, last)))
        sentences.setdefault(measured, []).append(f"{one_line(suite, 60)} {' → '.join(means)}")
    return "; ".join(f"{', '.join(parts)} ({measured})" for measured, parts in sentences.items())


def progress(document: Mapping[str, Any]) -> str:
    """Return how far training came, or "" when it did not start."""
    train = document["train"] or {}
    reports = [line for line in train.get("metrics", []) if is_report(line)]
    seed = train.get("seed")
    done = f"{seed['complete']} of {plural(seed['of'], 'seed')} trained" if seed else ""
    if not reports:
        return done or "training did not start"
    if seed and seed["finished"]:
        return done
    last = reports[-1]
    reached = (
        f"{'seed ' + str(seed['seed']) if seed else 'training'} reached iteration "
        f"{last.get('iteration')} of {last.get('iterations')}, loss {loss(last.get('loss'))}"
    )
    return f"{done}; {reached}" if seed else reached


def next_step(document: Mapping[str, Any], folder: str) -> str:
    """Return the command or action that comes next for a run in `folder`."""
    steps = {
        "done": f"talk to the model: mlx-ft chat {folder}",
        "gate_failed": f"read what was measured in {folder}/report.html, then change the recipe",
        "failed": "remove the cause, then give the same command again; finished stages are kept",
        "interrupted": "give the same command again; it continues with the unfinished stage",
        "stopped": "give the recipe to `mlx-ft run`; it continues with the next stage",
        "running": f"look again: mlx-ft show {folder}",
    }
    return steps.get(str(document["status"]), f"look again: mlx-ft show {folder}")
