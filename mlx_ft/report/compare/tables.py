"""`mlx-ft compare`: its tables, laid out once for every format.

Does not: read files, or compute anything beyond the document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_ft.export.survival.words import form_name, forms_of, kept_text
from mlx_ft.recipe.names import EXPORTED
from mlx_ft.report.evidence import TONES, said
from mlx_ft.report.tables import Cell, Row, Table, setting_text, table
from mlx_ft.runs.document import ordered_columns
from mlx_ft.text import quantities as q
from mlx_ft.text.safe import one_line

# What a reader wants to see first of what differs, beside the losses.
TELLING = (
    "model",
    "train.epochs",
    "train.iters",
    "train.lr_schedule.name",
    "train.learning_rate",
    "train.lora_parameters.rank",
    "train.num_layers",
    "data.max_seq_length",
    "train.seed",
)
TELLING_SHOWN = 3
NOTHING = "-"
BASELINE = "baseline"


def comparison_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """Return the non-empty tables of a comparison, in reading order.

    Summary (changed settings, the loss, its distance from the baseline), losses, scores, costs, and
    every changed value with its origin.
    """
    runs = comparison["runs"]
    tables = [
        summary_table(comparison),
        losses_table(runs),
        *score_tables(comparison),
        survival_table(runs),
        cost_table(runs),
        changes_table(comparison),
    ]
    return [made for made in tables if made is not None and made.rows]


def notes(comparison: Mapping[str, Any]) -> list[str]:
    """Return warnings about the tables, a sentence each."""
    own = [f"{run['run']}: {note}" for run in comparison["runs"] for note in run["notes"]]
    return [one_line(note, 300) for note in (*comparison["notes"], *own)]


def signed(value: Any, form: str = ".3f") -> str:
    """Format a difference with its sign, nothing as a dash, and no minus before zero."""
    if not q.is_number(value):
        return NOTHING
    text = f"{value:+{form}}"
    return text.replace("-", "+") if float(text) == 0 else text


def _known(text: str) -> str:
    return NOTHING if text == q.NOT_RECORDED else text


def summary_table(comparison: Mapping[str, Any]) -> Table:
    """Return one row a run: rows, the changed values that tell most, validation loss and delta.

    The lowest loss is marked, if all are of the same validation rows.
    """
    runs, changes = comparison["runs"], comparison["changes"]
    by_key = {change["key"]: change["values"] for change in changes}
    shown = [key for key in TELLING if key in by_key][:TELLING_SHOWN]
    losses = [(run["losses"] or {}).get("validation") for run in runs]
    lowest = min(filter(q.is_number, losses), default=None)
    if not comparison["same_validation_rows"]:
        lowest = None
    rows: list[Row] = []
    for number, run in enumerate(runs):
        loss = losses[number]
        best = len(runs) > 1 and lowest is not None and loss == lowest
        delta = BASELINE if number == 0 else signed(run["delta"])
        rows.append(
            [
                Cell(run["run"], "" if run["state"] == "finished" else _word(run["state"])),
                _known(q.count(run["training_rows"])),
                *(_value(by_key[key][number]) for key in shown),
                Cell(_known(q.loss(loss)), tone="ok" if best else ""),
                delta,
            ]
        )
    head = ["run", "training rows", *(_short(key) for key in shown)]
    head += ["validation loss", f"change from {BASELINE}"]
    numeric = [1, len(head) - 2, len(head) - 1]
    return table(f"Runs, compared with {comparison['baseline']}", head, rows, numeric)


def _word(state: str) -> str:
    return "stopped by a gate" if state == "gate_failed" else state


def _short(key: str) -> str:
    """Return a dotted key's last name, with the one before it where that says nothing alone."""
    parts = key.split(".")
    return " ".join(parts[-2:]) if parts[-1] == "name" and len(parts) > 1 else parts[-1]


def _value(cell: Mapping[str, Any] | None) -> str:
    return NOTHING if cell is None else one_line(setting_text(cell["value"]), 60)


def losses_table(runs: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return how the losses of each run went."""
    rows: list[Row] = []
    for run in runs:
        losses = run["losses"]
        if losses is None:
            continue
        step = f"{q.count(losses['best_iteration'])} of {q.count(losses['iterations'])}"
        reached = "" if losses["finished"] else f"reached iteration {q.count(losses['iteration'])}"
        rows.append(
            [
                Cell(run["run"], reached),
                _known(q.loss(losses["first_validation"])),
                _known(q.loss(losses["validation"])),
                _known(q.loss(losses["best"])),
                step if losses["best_iteration"] is not None else NOTHING,
                _known(q.loss(losses["train"])),
                signed(losses["gap"]),
            ]
        )
    head = ("run", "first", "final", "lowest", "at iteration", "training", "gap")
    caption = "Validation loss, training loss, and the gap between their final values"
    return table(caption, head, rows, range(1, 7)) if rows else None


def score_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """Return for each suite the mean scores of all columns, with the verdict on each against the
    baseline's.
    """
    runs = comparison["runs"]
    tables = []
    for suite in dict.fromkeys(suite for run in runs for suite in run["scores"]):
        measured = {column: None for run in runs for column in run["scores"].get(suite, {})}
        columns = ordered_columns(measured)
        rows = [
            [run["run"], *(_score(run["scores"].get(suite, {}).get(name)) for name in columns)]
            for run in runs
        ]
        caption = (
            f"{suite}: mean score, and on the same prompts the change from {BASELINE}, prompts "
            "won:lost, p for all suites, and how many more prompts would tell"
        )
        head = [Cell("run"), *(Cell(name, key=name) for name in columns)]
        tables.append(table(caption, head, rows, range(1, 1 + len(columns))))
    return tables


def _score(result: Mapping[str, Any] | None) -> Cell:
    if result is None:
        return Cell(NOTHING)
    judged = result["paired"]
    if judged is None:
        return Cell(q.score(result["mean"]), q.interval(result["low"], result["high"]))
    word, more = said(judged)
    won = f"{judged['wins']}:{judged['losses']}"
    note = f"{signed(judged['difference'], '.2f')}, {won}, p {q.probability(judged['p_holm'])}"
    note += f", {more}" if more else ""
    return Cell(f"{q.score(result['mean'])} {word}", note, TONES[word])


def survival_table(runs: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return the survival of the training in each stored model, and the required minimum."""
    told = [(run, run["survival"]) for run in runs if run["survival"]]
    rows = [
        [
            run["run"],
            *(_survived(found, way) for way in EXPORTED),
            kept_text(found.get("min_survival")),
        ]
        for run, found in told
    ]
    head = [Cell("run"), *(Cell(way, key=way) for way in EXPORTED), Cell("at least")]
    caption = "Share of what training changed that the exported models keep"
    return table(caption, head, rows, range(1, 2 + len(EXPORTED))) if rows else None


def _survived(survival: Mapping[str, Any], way: str) -> Cell:
    """Return what a stored model keeps, with how it is stored; a dash where nothing was learned."""
    found = forms_of(survival).get(way)
    if found is None:
        return Cell(NOTHING)
    return Cell(kept_text(found.get("survival")), one_line(form_name(way, survival), 60))


def cost_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Return time, memory and sizes of each run."""
    rows = [
        [
            run["run"],
            _known(q.count(run["trainable_parameters"])),
            _known(q.format_seconds(run["train_seconds"])),
            _known(q.format_seconds(run["seconds"])),
            _known(q.format_bytes(run["peak_memory_bytes"])),
            _known(q.format_bytes(run["model_bytes"])),
            _known(q.format_bytes(run["disk_bytes"])),
        ]
        for run in runs
    ]
    head = ("run", "trained parameters", "training", "all stages", "peak memory", "model", "disk")
    return table("Time, memory and size", head, rows, range(1, 7))


def changes_table(comparison: Mapping[str, Any]) -> Table:
    """Return every key whose value differs, a column a run, with where each value came from."""
    rows: list[Row] = []
    for change in comparison["changes"]:
        cells: list[str | Cell] = [change["key"]]
        for cell in change["values"]:
            origin = "" if cell is None else one_line(str(cell["origin"] or ""), 80)
            cells.append(Cell(_value(cell), origin))
        rows.append(cells)
    head = ("key", *(run["run"] for run in comparison["runs"]))
    return table("Changed values, and where each came from", head, rows)
