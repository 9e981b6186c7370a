"""report.html: one self-contained file about a run.

Does: fill the template with document, samples, tables and charts. Every text passes through
`text.safe.clean` and the template engine's escaping.
Does not: read anything outside the run folder, load anything from a network, or use a script.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mlx_ft.errors import Fault, RunError
from mlx_ft.export.survival import words as survival_words
from mlx_ft.report import choice, curves, evidence, survival, tables
from mlx_ft.report.checklist import checklist_table
from mlx_ft.report.differences import marked
from mlx_ft.report.failures import confusion_table, lint_table
from mlx_ft.report.samples import conversation, read_suite_samples
from mlx_ft.report.verdict import absence, expectations, verdict
from mlx_ft.runs.document import read_document
from mlx_ft.runs.reader import ArtifactReader
from mlx_ft.system.files import replacing
from mlx_ft.text import quantities as q
from mlx_ft.text.quantities import written
from mlx_ft.text.safe import clean, excerpt

REPORT = "report.html"
TEXT_LIMIT = 1500  # characters of one output that are shown
GRADIENT, MEMORY = "Gradient norm", "Peak memory so far"
REST_LIMIT = 200  # further samples of a suite; all of them are in eval/


def write_report(run: Path) -> Path:
    """Write `run/report.html` from the artifacts in `run` and return its path.

    The same artifacts give the same bytes. A reader of the file sees the old or the new report
    whole. Raises RunError for broken artifacts, no run folder, or a folder that cannot be written.
    """
    page = report_html(run)
    path = run / REPORT
    try:
        with replacing(path) as fresh:
            fresh.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        found = f"cannot be written ({error.strerror})"
        raise RunError(Fault(str(path), found, "make the folder writable or free space")) from error
    return path


def report_html(run: Path) -> str:
    """Return the report's HTML text. Raises RunError as `run_document` does."""
    reader = ArtifactReader(run)
    document = read_document(reader)
    samples = read_suite_samples(reader)
    reader.raise_faults()
    page: str = (
        environment()
        .get_template("report.html.j2")
        .render(
            document=document,
            verdict=verdict(document),
            missing=lambda what: absence(document, what),
            facts=_facts(document),
            recipe_tables=tables.recipe_tables(document["recipe"]) if document["recipe"] else None,
            reproduce=tables.reproduce_commands(document),
            suites=_suites(document, {suite.suite: suite for suite in samples}),
            gates=evidence.gate_table(document["gates"]),
            columns=evidence.column_table(document["columns"]),
            rest_limit=REST_LIMIT,
            training=_training(document),
            expectations=expectations(document),
            look_samples=_look_samples(document["train"]),
            data=_data(document["data"]),
            findings=tables.finding_table(document["preflight"]) if document["preflight"] else None,
            checklist=checklist_table(document),
            export=_export(document["export"]),
            survival=_survival(document["survival"]),
            stages=tables.stage_table(document["timings"]),
            environment=tables.environment_table(document),
            q=q,
        )
    )
    return page


def environment() -> Environment:
    """Return the template engine of the pages: every text is cleaned and escaped."""
    made = Environment(
        loader=PackageLoader("mlx_ft", "report/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    made.filters["excerpt"] = lambda text: excerpt(text, TEXT_LIMIT)
    made.filters["marked"] = marked
    return made


def _shown(value: Any) -> Any:
    """Clean every text on its way into the page, except our own markup (the charts)."""
    if isinstance(value, Markup):
        return value
    return clean(value) if isinstance(value, str) else value


def _picture(svg: str | None) -> Markup | None:
    """Mark a chart as HTML. `curves` has escaped its texts, and `clean` keeps markup."""
    return None if svg is None else Markup(clean(svg))


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the facts under the title, as (term, value), if recorded."""
    model = document["model"] or {}
    split = ((document["data"] or {}).get("splits") or {}).get("train") or {}
    quantized = (document["export"] or {}).get("quantized") or {}
    final = f"{q.format_bytes(quantized.get('bytes'))}, {survival_words.bits_name(quantized)}"
    timings = document["timings"]
    time = "time" if document["status"] == "done" else "time of the finished stages"
    facts = [
        ("model", model.get("name"), str(model.get("name"))),
        ("training rows", split.get("rows"), q.count(split.get("rows"))),
        ("final model", quantized.get("bytes"), final),
        (time, timings["total_seconds"], q.format_seconds(timings["total_seconds"])),
        ("started", timings["created"], q.moment(timings["created"])),
    ]
    return [(name, text) for name, value, text in facts if value is not None]


def _suites(document: Mapping[str, Any], samples: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each suite with its tables, bars and samples. Any of them may be missing."""
    results = document["eval"] or {}
    suites = []
    for number, name in enumerate(dict.fromkeys((*results, *samples)), start=1):
        columns = results.get(name)
        suites.append(
            {
                "name": name,
                "id": f"suite-{number}",
                "scores": tables.score_table(name, columns) if columns else None,
                "failures": tables.failure_table(name, columns) if columns else None,
                "paired": evidence.comparison_table(name, columns) if columns else None,
                "degenerate": evidence.degenerate_table(name, columns) if columns else None,
                "bars": _picture(curves.score_bars(f"suite-{number}", columns))
                if columns
                else None,
                "confusion": confusion_table(samples[name]) if name in samples else None,
                "samples": samples.get(name),
            }
        )
    return suites


def _training(document: Mapping[str, Any]) -> dict[str, Any] | None:
    train, by = document["train"], choice.selected_by(document)
    if train is None:
        return None
    metrics = train["metrics"]
    info = train["info"] or {}
    facts = tables.training_facts(train)
    if by is not None and info:
        facts.append(("chosen weights", choice.chosen_words(info, by)))
    seeds = info.get("seeds")
    if isinstance(seeds, dict):
        facts.append(("seeds", choice.seeds_words(seeds)))
    return {
        "facts": facts,
        "seeds": choice.seed_table(seeds) if isinstance(seeds, dict) else None,
        "scores": _picture(curves.selection_curve(train["metrics"])),
        "layers": [written(name) for name in (train["info"] or {}).get("adapted_layers") or []],
        "loss": _picture(curves.loss_curve(metrics)),
        "curves": [
            (words, _picture(picture))
            for words, picture in (
                ("Learning rate", curves.learning_rate_curve(metrics)),
                (GRADIENT, curves.plain_curve(metrics, "gradient_norm", GRADIENT)),
                (MEMORY, curves.plain_curve(metrics, "peak_memory_bytes", MEMORY, "GB", 1e9)),
            )
            if picture is not None
        ],
    }


def _look_samples(train: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [
        {
            "messages": conversation(sample.get("messages")),
            "text": written(sample.get("text")),
            "degenerate": written(sample.get("degenerate")),
            "finish_reason": written(sample.get("finish_reason")),
            "tokens": sample.get("generated_tokens"),
        }
        for sample in (train or {}).get("samples", [])
    ]


def _data(data: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if data is None:
        return None
    split = (data.get("splits") or {}).get("train") or {}
    return {
        "tables": tables.data_tables(data),
        "overlap_rows": data.get("overlap_rows"),
        "lint": lint_table(data),
        "lengths": _picture(curves.length_histogram(split)),
    }


def _survival(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "ways": survival.way_table(found),
        "layers": survival.layer_table(found),
        "chart": _picture(curves.survival_curve(survival.layer_curves(found))),
    }


def _export(export: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if export is None:
        return None
    return {
        "checks": tables.check_table(export),
        "models": tables.model_table(export),
        "both_ways": tables.both_ways_table(export),
        "dtype_reason": written(export.get("dtype_reason")) if export.get("dtype_reason") else None,
    }
