"""The summary at the end of a run, also printed by `mlx-ft show RUN`: plain text, no colour.

Does: lay the run's document out in at most about 90 columns. Does not: print or read files.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mlx_ft.export.survival.words import kept_text
from mlx_ft.report.choice import chosen_words, seeds_words, selected_by
from mlx_ft.report.evidence import comparison_lines, degenerate_lines, gate_lines
from mlx_ft.report.survival import SURVIVAL_HEAD, survival_rows
from mlx_ft.report.verdict import absence, expectations, next_step, progress, verdict
from mlx_ft.runs.document import ordered_columns
from mlx_ft.text import quantities as q
from mlx_ft.text.safe import clean, one_line

PLAIN = str.maketrans({"→": "->", "\N{EN DASH}": "-", "…": "..."})  # for terminals without UTF-8

NAMES = {"gguf": "GGUF"}


def result_lines(document: Mapping[str, Any], folder: Path | None = None) -> str:
    """Return the result of a run as text for a terminal, ending with a newline.

    folder: the run folder, for the path of the report and the next command (None: `runs/<run>`).
    """
    where = shlex.quote(str(folder) if folder is not None else f"runs/{document['run']}")
    judged = verdict(document)
    lines = [f"{document['run']}: {judged.title}", f"  {judged.evidence}".rstrip(), ""]
    warnings = [f"WARNING  {one_line(text, 400)}" for text in document["warnings"]]
    lines += [*warnings, ""] if warnings else []
    notes = expectations(document)
    lines += [f"{name:<11}{one_line(text, 400)}" for name, text in notes]
    lines += [""] if notes else []
    if document["eval"]:
        for suite, columns in document["eval"].items():
            lines += [*_suite_lines(str(suite), columns), ""]
    else:
        lines += [absence(document, "evaluation"), ""]
    if document["survival"]:
        lines += [*_survival_lines(document["survival"]), ""]
    gates = gate_lines(document.get("gates") or [])
    facts = [*gates, _preflight_line(document), _train_line(document), *_choice_lines(document)]
    facts += [_export_line(document)]
    facts += [_checks_line(document), _time_line(document)]
    lines += [line for line in facts if line]
    lines += [f"report   {where}/report.html", f"next     {next_step(document, where)}"]
    return clean("\n".join(lines)).translate(PLAIN) + "\n"


def _suite_lines(suite: str, columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = ordered_columns(columns)
    results = [columns[name] for name in names]
    categories = dict.fromkeys(c for result in results for c in result.get("by_category") or {})
    rows = []
    for category in categories:
        cells = [(result.get("by_category") or {}).get(category) for result in results]
        rows.append([one_line(category, 24), *_scores(cells)])
    rows.append(["all", *_scores(results)])
    intervals = [q.interval(result.get("low"), result.get("high")) for result in results]
    rows.append(["95 % interval", "", *intervals])
    head = [one_line(suite, 30), "n", *(one_line(name, 20) for name in names)]
    text = tabulate(
        rows, head, tablefmt="simple", disable_numparse=True, stralign="right", colalign=("left",)
    )
    lines = [*text.splitlines(), *_failure_lines(columns, names), *degenerate_lines(columns)]
    paired = comparison_lines(columns)
    return [*lines, "", *paired] if paired else lines


def _survival_lines(survival: Mapping[str, Any]) -> list[str]:
    """Return the table of survival by way of storing the model."""
    rows = [[one_line(cell, 30) for cell in row] for row in survival_rows(survival)]
    text = tabulate(
        rows,
        SURVIVAL_HEAD,
        tablefmt="simple",
        disable_numparse=True,
        stralign="right",
        colalign=("left",),
    )
    kept, limit = kept_text(survival.get("survival")), survival.get("min_survival")
    wanted = f", at least {kept_text(limit)} wanted" if q.is_number(limit) else ""
    return [
        *text.splitlines(),
        f"* the final model keeps {kept} of what training changed{wanted}",
    ]


def _scores(results: list[Any]) -> list[str]:
    sizes = dict.fromkeys(q.count(result.get("n")) for result in results if result)
    means = [q.score(result.get("mean")) if result else "-" for result in results]
    return ["/".join(sizes), *means]


def _failure_lines(columns: Mapping[str, Mapping[str, Any]], names: list[str]) -> list[str]:
    lines = []
    for name in names:
        failures = columns[name].get("failures") or {}
        if failures:
            kinds = ", ".join(f"{one_line(kind, 40)} {q.count(n)}" for kind, n in failures.items())
            lines.append(f"wrong outputs, {one_line(name, 20)}: {kinds}")
    return lines


def _preflight_line(document: Mapping[str, Any]) -> str:
    if document["preflight"] is None:
        return ""
    counts = document["preflight"]["counts"]
    return "checks   " + ", ".join(f"{count} {level}" for level, count in counts.items())


def _train_line(document: Mapping[str, Any]) -> str:
    train = document["train"]
    if train is None:
        return absence(document, "training")
    info = train["info"]
    if info is None:
        return f"train    {progress(document)}"
    parts = [
        f"{q.plural(info.get('iterations'), 'iteration')} "
        f"({q.plural(info.get('updates'), 'update')})",
        f"validation loss {q.loss(info.get('first_validation_loss'))} -> "
        f"{q.loss(info.get('final_validation_loss'))}",
        q.format_seconds(info.get("seconds")),
        f"peak memory {q.format_bytes(info.get('peak_memory_bytes'))}",
    ]
    return "train    " + ", ".join(parts)


def _choice_lines(document: Mapping[str, Any]) -> list[str]:
    info = (document["train"] or {}).get("info") or {}
    by = selected_by(document)
    lines = []
    if by is not None and q.is_number(info.get("chosen_iteration")):
        lines.append(f"chosen   weights of {chosen_words(info, by)}")
    seeds = info.get("seeds")
    if isinstance(seeds, dict):
        lines.append(f"seeds    {seeds_words(seeds)}")
    return lines


def _export_line(document: Mapping[str, Any]) -> str:
    made = [
        f"{NAMES.get(name, name)} {q.format_bytes(entry.get('bytes'))} "
        f"(export/{one_line(str(entry.get('path')), 60)})"
        for name, entry in (document["export"] or {}).items()
        if name in ("fused", "quantized", "gguf") and isinstance(entry, dict)
    ]
    return "export   " + ", ".join(made) if made else absence(document, "exported model")


def _checks_line(document: Mapping[str, Any]) -> str:
    checks = (document["export"] or {}).get("checks") or []
    if not checks:
        return ""
    passed = sum(bool(check.get("ok")) for check in checks)
    return f"verified {passed} of {q.plural(len(checks), 'export check')}"


def _time_line(document: Mapping[str, Any]) -> str:
    stages = {
        name: entry["seconds"]
        for name, entry in document["timings"]["stages"].items()
        if entry["seconds"] is not None
    }
    if not stages:
        return ""
    parts = ", ".join(f"{name} {q.format_seconds(seconds)}" for name, seconds in stages.items())
    return f"time     {q.format_seconds(document['timings']['total_seconds'])} ({parts})"
