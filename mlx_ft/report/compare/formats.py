"""`mlx-ft compare`: text, Markdown, CSV, JSON and HTML.

Does: write the same tables in each form, every text safe for it.
Does not: choose their content (`tables.py`).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping
from typing import Any

from tabulate import tabulate

from mlx_ft.report.compare.names import Format
from mlx_ft.report.compare.tables import comparison_tables, notes
from mlx_ft.report.html import environment
from mlx_ft.report.tables import Cell, Table, setting_text
from mlx_ft.report.terminal import PLAIN
from mlx_ft.runs.document import document_json
from mlx_ft.text import quantities as q
from mlx_ft.text.safe import clean, one_line

# What Markdown would read as something else than the letter it is.
MARKDOWN = re.compile(r"([\\`*_\[\]<>|#~$&!])")
# A spreadsheet would compute a text that begins so.
FORMULA = ("=", "+", "-", "@", "\t", "\r")

# Keys of a comparison with the first run, as numbers of a line in CSV.
PAIRED = ("difference", "low", "high", "wins", "losses", "p", "p_holm", "verdict", "more_prompts")


def as_text(comparison: Mapping[str, Any]) -> str:
    """Return the comparison as plain text for a terminal."""
    parts = [f"{made.caption}\n\n{_text_table(made)}\n" for made in comparison_tables(comparison)]
    said = notes(comparison)
    if said:
        parts.append("".join(f"note: {note}\n" for note in said))
    return clean("\n".join(parts)).translate(PLAIN)


def _text_table(made: Table) -> str:
    rows = []
    for row in made.rows:
        rows.append([_text_cell(cell) for cell in row])
        if any(cell.note for cell in row):
            rows.append([_clipped(cell.note) for cell in row])
    alignments = ["right" if n in made.numeric else "left" for n in range(len(made.head))]
    head = [one_line(cell.text, 40) for cell in made.head]
    return tabulate(rows, head, tablefmt="simple", disable_numparse=True, colalign=alignments)


def _text_cell(cell: Cell) -> str:
    marked = "* " if cell.tone == "ok" and not cell.note else ""
    return f"{marked}{one_line(cell.text, 60)}"


def _clipped(note: str) -> str:
    return one_line(note, 70)


def as_markdown(comparison: Mapping[str, Any]) -> str:
    """Return the comparison as Markdown tables, the best values in bold."""
    parts = [
        f"**{_marked(made.caption)}**\n\n{_markdown_table(made)}"
        for made in comparison_tables(comparison)
    ]
    parts += ["".join(f"- {_marked(note)}\n" for note in notes(comparison))]
    return "\n".join(part for part in parts if part)


def _markdown_table(made: Table) -> str:
    def cell(entry: Cell) -> str:
        text = _marked(entry.text)
        bold = f"**{text}**" if entry.tone == "ok" else text
        return f"{bold} ({_marked(entry.note)})" if entry.note else bold

    rule = ["---:" if number in made.numeric else "---" for number in range(len(made.head))]
    lines = [
        [cell(entry) for entry in made.head],
        rule,
        *([cell(e) for e in row] for row in made.rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _marked(text: str) -> str:
    return MARKDOWN.sub(r"\\\1", one_line(text, 300))


def as_csv(comparison: Mapping[str, Any]) -> str:
    """Return one line per run with plain numbers, for spreadsheets and data frames."""
    rows = [_csv_row(comparison, number) for number in range(len(comparison["runs"]))]
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([_not_a_formula(name) for name in names])
    writer.writerows([[_not_a_formula(row.get(name)) for name in names] for row in rows])
    return stream.getvalue()


def _csv_row(comparison: Mapping[str, Any], number: int) -> dict[str, Any]:
    run = comparison["runs"][number]
    plain = {
        name: value
        for name, value in run.items()
        if name not in ("losses", "scores", "survival", "notes")
    }
    losses = {f"loss.{name}": value for name, value in (run["losses"] or {}).items()}
    scores: dict[str, Any] = {}
    for suite, columns in run["scores"].items():
        for column, result in columns.items():
            at = f"{suite}.{column}"
            judged = result["paired"] or {}
            scores |= {f"{at}.mean": result["mean"], f"{at}.n": result["n"]}
            for name in PAIRED:
                scores[f"{at}.{name}"] = judged.get(name)
    changed = {
        change["key"]: None
        if change["values"][number] is None
        else setting_text(change["values"][number]["value"])
        for change in comparison["changes"]
    }
    return {**plain, **losses, **scores, **changed, "notes": "; ".join(run["notes"])}


def _not_a_formula(value: Any) -> Any:
    if value is None or isinstance(value, bool) or q.is_number(value):
        return "" if value is None else value
    text = one_line(str(value), 2000)
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.startswith(FORMULA) else text
    return text


def as_json(comparison: Mapping[str, Any]) -> str:
    """Return the comparison as a JSON document."""
    return document_json(dict(comparison)) + "\n"


def as_html(comparison: Mapping[str, Any]) -> str:
    """Return the comparison as one self-contained HTML page."""
    page: str = (
        environment()
        .get_template("comparison.html.j2")
        .render(
            comparison=comparison,
            tables=comparison_tables(comparison),
            notes=notes(comparison),
            q=q,
        )
    )
    return page


WRITERS: Mapping[Format, Callable[[Mapping[str, Any]], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "csv": as_csv,
    "json": as_json,
    "html": as_html,
}
