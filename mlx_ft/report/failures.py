"""Kinds of failure before and after training, and findings of the lint, as tables.

Does not: judge an output or a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mlx_ft.report.samples import Answer, Sample, SuiteSamples
from mlx_ft.report.tables import Cell, Row, Table, table
from mlx_ft.text import quantities as q
from mlx_ft.text.quantities import written
from mlx_ft.text.safe import one_line

RIGHT, PARTLY = "right", "partly right"
SHOWN_LINES = 8


def confusion_table(samples: SuiteSamples) -> Table | None:
    """Return how many samples moved from each outcome to each other one.

    Rows: outcomes of the first column. Columns: outcomes of the last column. None if fewer than two
    columns were measured.
    """
    if len(samples.columns) < 2:
        return None
    first, last = samples.columns[0], samples.columns[-1]
    counts: Counter[tuple[str, str]] = Counter()
    for sample in (*samples.first, *samples.rest):
        before, after = _outcome(sample, first), _outcome(sample, last)
        if before is not None and after is not None:
            counts[before, after] += 1
    if not counts:
        return None
    starts = _ordered(Counter(before for before, _ in counts.elements()))
    ends = _ordered(Counter(after for _, after in counts.elements()))
    rows: list[Row] = [
        [one_line(before, 60), *(_count(counts[before, after], before, after) for after in ends)]
        for before in starts
    ]
    caption = f"{samples.suite}: outcomes of {first} (rows) and of {last} (columns)"
    head = ["outcome", *(one_line(after, 60) for after in ends)]
    return table(caption, head, rows, range(1, 1 + len(ends)))


def _count(count: int, before: str, after: str) -> Cell:
    tone = ""
    if count and before != after and RIGHT in (before, after):
        tone = "ok" if after == RIGHT else "fail"
    return Cell(q.count(count) if count else "-", tone=tone)


def _ordered(counts: Counter[str]) -> list[str]:
    """Return outcomes, the right one first, then the most frequent."""
    return sorted(counts, key=lambda name: (name != RIGHT, -counts[name], name))


def _outcome(sample: Sample, column: str) -> str | None:
    found = [answer for answer in sample.answers if column in answer.columns]
    return _name(found[0]) if found else None


def _name(answer: Answer) -> str:
    if answer.passed:
        return RIGHT
    return answer.failure or PARTLY


def lint_table(data: Mapping[str, Any]) -> Table | None:
    """Return the findings of the lint: rule, number of rows, first lines. None without findings."""
    found = [entry for entry in data.get("lint") or [] if isinstance(entry, dict)]
    if not found:
        return None
    rows: list[Row] = []
    for entry in found:
        lines = entry.get("lines")
        lines = lines if isinstance(lines, list) else []
        more = ", ..." if len(lines) > SHOWN_LINES else ""
        severity = written(entry.get("severity"))
        rows.append(
            [
                written(entry.get("rule")),
                Cell(severity, tone=severity if severity in ("warn", "fail") else ""),
                q.count(entry.get("count", len(lines))),
                one_line(written(entry.get("found")), 160),
                ", ".join(written(line) for line in lines[:SHOWN_LINES]) + more,
                one_line(written(entry.get("fix")), 200),
            ]
        )
    head = ("rule", "level", "rows", "found", "lines", "what to do")
    return table("What looked wrong in the rows", head, rows, [2])
