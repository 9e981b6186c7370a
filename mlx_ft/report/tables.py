"""Tables of the report: the run's document as rows of text with units.

Does not: escape (the template does) or read files.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_ft.recipe.keys import flattened, setting
from mlx_ft.recipe.load import DEFAULT, DERIVED, SET
from mlx_ft.recipe.mlx_lm_keys import MLX_LM_DEFAULT
from mlx_ft.runs.document import is_report, ordered_columns
from mlx_ft.text import quantities as q
from mlx_ft.text.quantities import written

ASSUMED = (DEFAULT, DERIVED, MLX_LM_DEFAULT)
TONES = {"ok": "ok", "warn": "warn", "fail": "fail", True: "ok", False: "fail"}


@dataclass(frozen=True)
class Cell:
    """One cell: `text`, a smaller `note`, a `tone` (ok, warn, fail) and a `key` to the charts."""

    text: str
    note: str = ""
    tone: str = ""
    key: str = ""


@dataclass(frozen=True)
class Table:
    """A captioned table. The first cell of a row is its heading.

    numeric: numbers of the right-aligned columns.
    """

    caption: str
    head: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[int] = frozenset()


Row = Sequence[str | Cell]


def table(
    caption: str,
    head: Sequence[str | Cell],
    rows: Iterable[Row],
    numeric: Iterable[int] = (),
) -> Table:
    """Return a Table, with plain texts made into cells."""

    def cells(entries: Sequence[str | Cell]) -> tuple[Cell, ...]:
        return tuple(e if isinstance(e, Cell) else Cell(e) for e in entries)

    return Table(caption, cells(head), tuple(cells(row) for row in rows), frozenset(numeric))


def score_table(suite: str, columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return mean scores with 95 % intervals: all samples first, then each category."""
    names = ordered_columns(columns)
    categories = dict.fromkeys(c for n in names for c in columns[n].get("by_category") or {})
    head = [Cell("category"), Cell("n"), *(Cell(name, key=name) for name in names)]
    rows = [_score_row("all", [columns[name] for name in names])]
    for category in categories:
        results = [(columns[name].get("by_category") or {}).get(category) for name in names]
        rows.append(_score_row(category, results))
    caption = f"{suite}: mean score from 0 to 1 and its 95 % interval"
    return table(caption, head, rows, range(1, 2 + len(names)))


def _score_row(name: str, results: Sequence[Mapping[str, Any] | None]) -> list[str | Cell]:
    sizes = dict.fromkeys(q.count(result.get("n")) for result in results if result)
    row: list[str | Cell] = [name, "/".join(sizes)]
    for result in results:
        if result is None:
            row.append("not measured")
        else:
            note = q.interval(result.get("low"), result.get("high"))
            row.append(Cell(q.score(result.get("mean")), note))
    return row


def failure_table(suite: str, columns: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """Return how often each kind of wrong output occurred, or None when none did."""
    names = ordered_columns(columns)
    kinds = dict.fromkeys(k for n in names for k in columns[n].get("failures") or {})
    if not kinds:
        return None
    rows = [
        [kind, *(q.count((columns[n].get("failures") or {}).get(kind, 0)) for n in names)]
        for kind in kinds
    ]
    head = [Cell("kind"), *(Cell(name, key=name) for name in names)]
    caption = f"{suite}: what the wrong outputs were, in samples"
    return table(caption, head, rows, range(1, 1 + len(names)))


def recipe_tables(recipe: Mapping[str, Any]) -> tuple[Table, Table]:
    """Return the given values (with their places), and the default and derived ones."""
    values, origins = recipe["values"], recipe["origins"]
    asked: list[tuple[str, ...]] = []
    assumed: list[tuple[str, ...]] = []
    for key in flattened(values, origins):
        origin = str(origins.get(key, "not recorded"))
        place = origin.replace(f"{recipe['file']}:", "line ", 1)
        row = (key, setting_text(setting(values, key)), place)
        (assumed if origin in ASSUMED else asked).append(row)
    head = ("key", "value", "from")
    return (
        table(f"Given by {recipe['file'] or 'the recipe'} or on the command line", head, asked),
        table("Defaults and derived values", head, assumed),
    )


def setting_text(value: Any) -> str:
    """Return a recipe's value as one would write it."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value) if value is not None else "none"
    if isinstance(value, (int, float)):
        return q.compact(value)
    if isinstance(value, list):
        return ", ".join(setting_text(entry) for entry in value) or "none"
    return written(value)


def reproduce_commands(document: Mapping[str, Any]) -> list[str]:
    """Return the shell commands that make this run again, as far as they are recorded."""
    recipe, environment = document["recipe"], document["environment"] or {}
    if not recipe or not recipe["file"]:
        return []
    words = ["mlx-ft", "run", str(recipe["file"])]
    for key in flattened(recipe["values"], recipe["origins"]):
        if recipe["origins"].get(key) == SET:
            value = setting(recipe["values"], key)
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            words += ["--set", f"{key}={text}"]
    commit = environment.get("commit")
    checkout = [f"git checkout {shlex.quote(str(commit))}"] if commit else []
    return [*checkout, shlex.join(words)]


def data_tables(data: Mapping[str, Any]) -> list[Table]:
    """Return rows and tokens of each split, the length coverage, categories and source files."""
    splits = {k: v for k, v in (data.get("splits") or {}).items() if isinstance(v, dict)}
    head = (
        "split",
        "rows",
        "dropped",
        "turns",
        "tokens",
        "trained",
        "5 %",
        "median",
        "95 %",
        "max",
    )
    rows = []
    for name, split in splits.items():
        lengths = split.get("length_quantiles") or {}
        rows.append(
            [
                name,
                *(
                    q.count(split.get(key))
                    for key in ("rows", "dropped_overlong", "turns", "tokens")
                ),
                q.share(split.get("trained_share")),
                *(q.count(lengths.get(key)) for key in ("p5", "p50", "p95", "max")),
            ]
        )
    caption = (
        "Rows and tokens; trained is the share of tokens that the loss counts; lengths in tokens"
    )
    tables = [table(caption, head, rows, range(1, 10))]
    categories = dict.fromkeys(
        c for split in splits.values() for c in split.get("categories") or {}
    )
    if categories:
        body = [
            [c, *(q.count((s.get("categories") or {}).get(c, 0)) for s in splits.values())]
            for c in categories
        ]
        columns = range(1, 1 + len(splits))
        tables.append(table("Rows by category", ("category", *splits), body, columns))
    coverage = data.get("coverage") or {}
    if coverage:
        body = [[f"{length} tokens", q.share(part)] for length, part in coverage.items()]
        tables.append(table("Rows that fit in a length", ("length", "rows"), body, [1]))
    sources = [
        (str(source.get("path")), name, str(source.get("sha256"))[:16])
        for name, split in splits.items()
        for source in split.get("sources") or []
    ]
    if sources:
        tables.append(table("Source files", ("file", "split", "sha256 begins"), sources))
    return tables


def finding_table(preflight: Mapping[str, Any]) -> Table:
    """Return the findings of the preflight, the worst first."""
    order = {"fail": 0, "warn": 1}
    findings = sorted(preflight["findings"], key=lambda f: order.get(str(f.get("level")), 2))
    rows: list[Row] = [
        [
            written(finding.get("check")),
            Cell(written(finding.get("level")), tone=TONES.get(finding.get("level"), "")),
            written(finding.get("measured")),
            written(finding.get("limit")),
            written(finding.get("fix")),
        ]
        for finding in findings
    ]
    return table(
        "Findings, the worst first", ("check", "level", "measured", "limit", "what to do"), rows
    )


def check_table(export: Mapping[str, Any]) -> Table:
    """Return the verifications of the export."""
    rows: list[Row] = [
        [
            written(check.get("check")),
            Cell("ok" if check.get("ok") else "failed", tone=TONES[bool(check.get("ok"))]),
            written(check.get("measured")),
            written(check.get("limit")),
        ]
        for check in export.get("checks") or []
    ]
    return table(
        "What was verified while the models were made",
        ("check", "result", "measured", "limit"),
        rows,
    )


def both_ways_table(export: Mapping[str, Any]) -> Table | None:
    """Return the distances from the trained model: fused into the original and into the base.

    None without an original.
    """
    ways = (export.get("original") or {}).get("from_trained")
    if not isinstance(ways, dict):
        return None
    rows: list[Row] = [
        [
            f"{way}, {form}",
            f"{difference['divergence']:.4f} nats",
            q.share(difference["flips"]),
        ]
        for way, forms in ways.items()
        for form, difference in forms.items()
    ]
    return table(
        "Distance from the model that was trained, by what the adapter was fused into",
        ("fused", "mean divergence", "top token differs"),
        rows,
        [1, 2],
    )


def model_table(export: Mapping[str, Any]) -> Table:
    """Return the exported models, a GGUF file included, with their size."""
    rows: list[Row] = []
    for name in ("fused", "quantized"):
        made = export.get(name)
        if isinstance(made, dict):
            form = "16-bit"
            if name == "quantized":
                raised = q.plural(len(made["raised"]), "layer") if made.get("raised") else ""
                form = f"{made.get('bits')}-bit, group size {made.get('group_size')}"
                form += f", {raised} with more bits" if raised else ""
            rows.append(
                [
                    Cell(name, key=name),
                    f"export/{made.get('path')}",
                    form,
                    q.format_bytes(made.get("bytes")),
                ]
            )
    gguf = export.get("gguf")
    if isinstance(gguf, dict):
        name = f"export/{gguf.get('path')}"
        rows.append(["GGUF", name, written(gguf.get("kind")), q.format_bytes(gguf.get("bytes"))])
    head = ("model", "folder or file", "weights", "size")
    return table("Exported models", head, rows, [3])


def training_facts(train: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the training stage's recorded facts as (term, value)."""
    info = train["info"] or {}
    reports = [line for line in train["metrics"] if is_report(line)]
    last = reports[-1] if reports else {}
    speeds = [r["tokens_per_second"] for r in reports if q.is_number(r.get("tokens_per_second"))]
    trainable, total = info.get("trainable_parameters"), info.get("total_parameters")
    part = trainable / total if q.is_number(trainable) and q.is_number(total) and total else None
    layers = info.get("adapted_layers") or []
    last_loss = "final training loss" if info else "last training loss"
    facts = [
        (
            "trainable parameters",
            (trainable, f"{q.count(trainable)} of {q.count(total)} ({q.share(part)})"),
        ),
        ("adapted layers", (layers or None, q.plural(len(layers), "module"))),
        ("iterations", (info.get("iterations"), _steps(info))),
        ("first validation loss", _fact(info.get("first_validation_loss"), q.loss)),
        ("final validation loss", _fact(info.get("final_validation_loss"), q.loss)),
        (last_loss, _fact(info.get("final_train_loss", last.get("loss")), q.loss)),
        ("trained tokens", _fact(last.get("trained_tokens"), q.count)),
        ("speed", _fact(sum(speeds) / len(speeds) if speeds else None, q.rate)),
        (
            "peak memory",
            _fact(info.get("peak_memory_bytes", last.get("peak_memory_bytes")), q.format_bytes),
        ),
        ("time", _fact(info.get("seconds", last.get("seconds")), q.format_seconds)),
        ("computed in", _fact(info.get("compute"), str)),
        ("fast path", _fact(info.get("fast_path"), str)),
    ]
    return [(name, text) for name, (value, text) in facts if value is not None]


def _steps(info: Mapping[str, Any]) -> str:
    epochs = info.get("epochs")
    passes = f", {epochs:.3g} epochs" if q.is_number(epochs) else ""
    updates = q.plural(info.get("updates"), "optimizer update")
    return f"{q.count(info.get('iterations'))} ({updates}{passes})"


def _fact(value: Any, form: Any) -> tuple[Any, str]:
    return value, form(value)


def stage_table(timings: Mapping[str, Any]) -> Table:
    """Return state, time and peak memory of each stage, and the total time."""
    rows: list[Row] = []
    for stage, entry in timings["stages"].items():
        state = entry["state"] or "not there"
        note = "reused" if entry["reused"] else ""
        tone = {"complete": "ok", "not there": ""}.get(state, "warn")
        rows.append(
            [
                stage,
                Cell(state, note, tone),
                q.format_seconds(entry["seconds"]),
                q.format_bytes(entry["peak_memory_bytes"]),
            ]
        )
    rows.append(["all stages", "", q.format_seconds(timings["total_seconds"]), ""])
    return table("Each stage, in order", ("stage", "state", "time", "peak memory"), rows, [2, 3])


def environment_table(document: Mapping[str, Any]) -> Table:
    """Return model, versions and machine."""
    model, environment = document["model"] or {}, document["environment"] or {}
    named = [(f"model: {key}", value) for key, value in model.items()] + list(environment.items())
    rows = [
        (key.removesuffix("_bytes"), q.format_bytes(value))
        if key.endswith("_bytes")
        else (key, setting_text(value))
        for key, value in named
    ]
    return table("Model, versions and machine", ("what", "value"), rows)
