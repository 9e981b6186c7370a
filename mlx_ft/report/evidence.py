"""Columns compared, gates and degeneration: the evidence of the evaluation as tables and lines.

Does not: judge or compute statistics. Documents of older runs have none of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from mlx_ft.report.tables import Cell, Row, Table, table
from mlx_ft.runs.document import ordered_columns
from mlx_ft.text import quantities as q
from mlx_ft.text.safe import one_line

SIGNS = {
    "any": "degenerate in any way",
    "empty": "empty",
    "loop": "loops",
    "leaked_token": "shows a control token",
    "open_thinking": "never ends thinking",
    "cut": "cut by max_tokens",
    "wrong_language": "another language than the prompt's",
}
TEMPLATES = {
    "same": ("the training's", "ok"),
    "own": ("its own: no training is known", ""),
    "mismatch": ("NOT the training's, which was allowed", "fail"),
    "unknown": ("a server's, not compared with the training's", "warn"),
}
TONES = {"better": "ok", "worse": "fail", "cannot tell": "warn"}
Columns = Mapping[str, Mapping[str, Any]]


def _comparisons(columns: Columns) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (column, reference column, comparison), the base first."""
    for name in ordered_columns(columns):
        against = columns[name].get("against") or {}
        for other in ordered_columns(against):
            if isinstance(against[other], Mapping):
                yield name, other, against[other]


def said(found: Mapping[str, Any]) -> tuple[str, str]:
    """Return the verdict of a comparison. Without one, return how many more prompts would tell."""
    verdict, more = str(found.get("verdict")), found.get("more_prompts")
    if verdict != "cannot tell":
        return verdict, ""
    if q.is_number(more):
        return verdict, f"about {q.count(more)} more would"
    return verdict, ""


def comparison_table(suite: str, columns: Columns) -> Table | None:
    """Return each column against base and adapter, prompt by prompt, or None when none was."""
    rows: list[Row] = []
    for name, other, found in _comparisons(columns):
        verdict, note = said(found)
        rows.append(
            [
                Cell(f"{name} less {other}", key=name),
                Cell(
                    q.difference(found.get("difference")),
                    q.signed_interval(found.get("low"), found.get("high")),
                ),
                f"{q.count(found.get('wins'))} / {q.count(found.get('losses'))}",
                Cell(q.probability(found.get("p_holm")), f"n {q.count(found.get('n'))}"),
                Cell(verdict, note, TONES.get(verdict, "")),
            ]
        )
    if not rows:
        return None
    caption = f"{suite}: the same prompts compared one by one, with the difference's 95 % interval"
    head = ("columns", "difference", "won / lost", "p, for all suites", "verdict")
    return table(caption, head, rows, [1, 2, 3])


def column_table(columns: Columns) -> Table | None:
    """Return whose chat format each column was asked in and which model it is, or None when that
    was not recorded.
    """
    rows: list[Row] = []
    for name in ordered_columns(columns):
        state = str(columns[name].get("template", q.NOT_RECORDED))
        words, tone = TEMPLATES.get(state, (state, "warn"))
        facts = [
            f"{key} {one_line(str(value), 200)}"
            for key, value in columns[name].items()
            if key != "template" and value is not None
        ]
        rows.append([Cell(name, key=name), Cell(words, tone=tone), ", ".join(facts)])
    if not rows:
        return None
    head = ("column", "chat format", "model")
    # Servers say which model they have; the run's own columns need not.
    shown = len(head) if any(row[-1] for row in rows) else len(head) - 1
    return table("Who was asked, in which chat format", head[:shown], [row[:shown] for row in rows])


def degenerate_table(suite: str, columns: Columns) -> Table | None:
    """Return how often answers showed each sign, with 95 % intervals, or None if not recorded."""
    names = [name for name in ordered_columns(columns) if columns[name].get("degenerate")]
    if not names:
        return None
    rows = []
    for sign, words in SIGNS.items():
        cells: list[str | Cell] = [words]
        for name in names:
            rate = columns[name]["degenerate"].get(sign) or {}
            share = q.share(rate.get("rate"))
            cells.append(Cell(share, q.interval(rate.get("low"), rate.get("high"))))
        rows.append(cells)
    caption = f"{suite}: share of answers with a sign that something is wrong, with 95 % intervals"
    head = [Cell("sign"), *(Cell(name, key=name) for name in names)]
    return table(caption, head, rows, range(1, 1 + len(names)))


def gate_table(gates: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return the measured number of each gate and whether it holds, or None without gates."""
    rows: list[Row] = []
    for gate in gates:
        holds = "holds" if gate["passed"] else "fails"
        unsure = "" if gate["settled"] else "too few prompts to settle it"
        tone = "fail" if not gate["passed"] else "ok" if gate["settled"] else "warn"
        interval = q.signed_interval(gate["low"], gate["high"])
        rows.append(
            [
                Cell(f"{gate['suite']}.{gate['column']}.{gate['metric']}", str(gate["asked_by"])),
                str(gate["limit"]),
                Cell(_number(gate["measured"]), interval),
                q.count(gate["n"]),
                Cell(holds, unsure, tone),
                ", ".join(map(str, gate["failed"])),
            ]
        )
    if not rows:
        return None
    head = ("gate", "limit", "measured", "n", "outcome", "failed samples")
    return table("Gates, each with the 95 % interval of what was measured", head, rows, [2, 3])


def _number(value: Any) -> str:
    return f"{value:.3f}" if q.is_number(value) else q.NOT_RECORDED


def comparison_lines(columns: Columns) -> list[str]:
    """Return the comparisons of a suite as lines of text."""
    rows = []
    for name, other, found in _comparisons(columns):
        verdict, note = said(found)
        rows.append(
            [
                f"{one_line(name, 20)} - {one_line(other, 20)}",
                q.difference(found.get("difference")),
                q.signed_interval(found.get("low"), found.get("high")),
                f"{q.count(found.get('wins'))}/{q.count(found.get('losses'))}",
                f"{q.probability(found.get('p_holm'))} (n {q.count(found.get('n'))})",
                f"{verdict}, {note}" if note else verdict,
            ]
        )
    if not rows:
        return []
    head = ["paired", "difference", "95 %", "won/lost", "p", "verdict"]
    align = ("left", "right", "right", "right", "right", "left")
    text = tabulate(rows, head, tablefmt="plain", disable_numparse=True, colalign=align)
    return text.splitlines()


def degenerate_lines(columns: Columns) -> list[str]:
    """Return a line on degenerate answers, with the interval of the last column."""
    names = [name for name in ordered_columns(columns) if columns[name].get("degenerate")]
    if not names:
        return []
    rates = {name: columns[name]["degenerate"].get("any") or {} for name in names}
    counts = ", ".join(
        f"{one_line(name, 20)} {q.count(rates[name].get('count'))}" for name in names
    )
    last = rates[names[-1]]
    return [
        f"degenerate outputs: {counts} of {q.count(columns[names[-1]].get('n'))} "
        f"({one_line(names[-1], 20)}: 95 % {q.interval(last.get('low'), last.get('high'))})"
    ]


def gate_lines(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each gate: whether it holds, and the samples that failed."""
    lines = []
    for gate in gates:
        word = "holds" if gate["passed"] else "FAILS"
        name = one_line(f"{gate['suite']}.{gate['column']}.{gate['metric']}", 80)
        interval = q.signed_interval(gate["low"], gate["high"])
        between = f", 95 % {interval}" if interval else ""
        unsure = "" if gate["settled"] else ", not settled"
        lines.append(
            f"gate     {word} {name} {_number(gate['measured'])} {gate['limit']} "
            f"(n {q.count(gate['n'])}{between}){unsure}"
        )
        if gate["failed"]:
            lines.append(f"         see {one_line(', '.join(map(str, gate['failed'])), 90)}")
    return lines
