"""Write `report.html`: one self-contained file that a run folder can be read by.

Does: bring document, samples, tables and charts into the template; every text passes through
`text.clean` and the template engine's escaping. Does not: read anything but the run folder, load
anything from anywhere, or use a script.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mlx_ft.errors import Fault, RunError
from mlx_ft.report import curves, tables
from mlx_ft.report import quantities as q
from mlx_ft.report.reading import ArtifactReader
from mlx_ft.report.samples import conversation, read_suite_samples, written
from mlx_ft.report.summary import read_document
from mlx_ft.report.text import clean, excerpt
from mlx_ft.report.verdict import absence, verdict
from mlx_ft.runs import replacing

REPORT = "report.html"
TEXT_LIMIT = 1500  # characters of one output that are shown
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
    """Return the report's HTML text; raises RunError as `run_document` does."""
    reader = ArtifactReader(run)
    document = read_document(reader)
    samples = read_suite_samples(reader)
    reader.raise_faults()
    page: str = (
        _environment()
        .get_template("report.html.j2")
        .render(
            document=document,
            verdict=verdict(document),
            missing=lambda what: absence(document, what),
            facts=_facts(document),
            recipe_tables=tables.recipe_tables(document["recipe"]) if document["recipe"] else None,
            reproduce=tables.reproduce_commands(document),
            suites=_suites(document, {suite.suite: suite for suite in samples}),
            rest_limit=REST_LIMIT,
            training=_training(document["train"]),
            look_samples=_look_samples(document["train"]),
            data=_data(document["data"]),
            findings=tables.finding_table(document["preflight"]) if document["preflight"] else None,
            export=_export(document["export"]),
            stages=tables.stage_table(document["timings"]),
            environment=tables.environment_table(document),
            q=q,
        )
    )
    return page


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mlx_ft", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters["excerpt"] = lambda text: excerpt(text, TEXT_LIMIT)
    return environment


def _shown(value: Any) -> Any:
    """Clean every text on its way into the page; markup is ours (the charts)."""
    if isinstance(value, Markup):
        return value
    return clean(value) if isinstance(value, str) else value


def _picture(svg: str | None) -> Markup | None:
    """Mark a chart as HTML: `curves` escapes its texts, and `clean` keeps what is no markup."""
    return None if svg is None else Markup(clean(svg))


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the few facts under the title, as (term, value); those not recorded are left out."""
    model = document["model"] or {}
    split = ((document["data"] or {}).get("splits") or {}).get("train") or {}
    quantized = (document["export"] or {}).get("quantized") or {}
    final = f"{q.size(quantized.get('bytes'))}, {quantized.get('bits')}-bit"
    timings = document["timings"]
    time = "time" if document["status"] == "done" else "time of the finished stages"
    facts = [
        ("model", model.get("name"), str(model.get("name"))),
        ("training rows", split.get("rows"), q.count(split.get("rows"))),
        ("final model", quantized.get("bytes"), final),
        (time, timings["total_seconds"], q.duration(timings["total_seconds"])),
        ("started", timings["created"], q.moment(timings["created"])),
    ]
    return [(name, text) for name, value, text in facts if value is not None]


def _suites(document: Mapping[str, Any], samples: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each suite with its tables, bars and samples; any of them may be missing."""
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
                "bars": _picture(curves.score_bars(f"suite-{number}", columns))
                if columns
                else None,
                "samples": samples.get(name),
            }
        )
    return suites


def _training(train: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if train is None:
        return None
    return {
        "facts": tables.training_facts(train),
        "layers": [written(name) for name in (train["info"] or {}).get("adapted_layers") or []],
        "loss": _picture(curves.loss_curve(train["metrics"])),
        "learning_rate": _picture(curves.learning_rate_curve(train["metrics"])),
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
        "lengths": _picture(curves.length_histogram(split)),
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
