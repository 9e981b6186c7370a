"""`mlx-ft compare`: the document. Differences of several runs, in settings and in results.

Does: read the run folders as `mlx-ft show` does, find settings that differ, set losses and scores
against those of the first run, pair answers to the same prompts. Unfinished, failed and unmeasured
runs take part; `notes` say what they lack.
Does not: print (`tables.py`), or decide which run to use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault, RunError
from mlx_ft.evaluate.paired_stats import Records, compare_logs
from mlx_ft.recipe.keys import flattened, setting
from mlx_ft.report.compare.formats import WRITERS
from mlx_ft.report.compare.names import Format
from mlx_ft.report.tables import ASSUMED
from mlx_ft.runs.document import is_report, ordered_columns, read_document
from mlx_ft.runs.listing import disk_bytes
from mlx_ft.runs.reader import ArtifactReader
from mlx_ft.runs.state import state_of
from mlx_ft.text.quantities import is_number

SCHEMA = 1
# Names and places differ between any two runs and explain nothing.
NOT_COMPARED = ("name",)
ENDINGS: Mapping[str, Format] = {".md": "markdown", ".csv": "csv", ".json": "json", ".html": "html"}


def compare(runs: Sequence[Path]) -> dict[str, Any]:
    """Return the comparison of `runs` as one JSON document. The first one is the baseline.

    Raises one RunError that names all folders without a run, and all given twice.
    """
    twice = [run for number, run in enumerate(runs) if run.resolve() in _resolved(runs[:number])]
    faults = [Fault(str(run), "is given twice", "name each run once") for run in twice]
    readers = []
    for run in runs:
        try:
            readers.append(ArtifactReader(run))
        except RunError as error:
            faults.extend(error.faults)
    if faults:
        raise RunError(faults)
    documents = [read_document(reader) for reader in readers]
    entries = [
        _entry(reader, document) for reader, document in zip(readers, documents, strict=True)
    ]
    _label(entries)
    _set_against_first(entries)
    for entry, reader in zip(entries, readers, strict=True):
        _pair(entry, entries[0], reader, readers[0])
    return {
        "schema": SCHEMA,
        "baseline": entries[0]["run"],
        "runs": entries,
        "changes": changes(documents),
        "same_validation_rows": not _loss_notes(documents),
        "notes": [*_loss_notes(documents), *_base_notes(documents)],
    }


def _resolved(runs: Sequence[Path]) -> set[Path]:
    return {run.resolve() for run in runs}


def changes(documents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the recipes' keys whose values are not alike in all runs: `key`, and for each run its
    `values` entry, {"value", "origin"}, or None where the run has no such key or no recipe.
    """
    recipes = [document["recipe"] or {"values": {}, "origins": {}} for document in documents]
    settings: list[dict[str, Any]] = []
    for recipe in recipes:
        keys = flattened(recipe["values"], recipe["origins"])
        settings.append({key: setting(recipe["values"], key) for key in keys})
    found = []
    for key in dict.fromkeys(key for each in settings for key in each):
        if key in NOT_COMPARED or not _differs(key, recipes, settings):
            continue
        cells = [
            {"value": each[key], "origin": recipe["origins"].get(key)} if key in each else None
            for each, recipe in zip(settings, recipes, strict=True)
        ]
        found.append({"key": key, "values": cells})
    return found


def _differs(
    key: str, recipes: Sequence[Mapping[str, Any]], settings: Sequence[Mapping[str, Any]]
) -> bool:
    """Return whether a key's value differs between recipes.

    A recipe of an earlier version may lack the key. This is a difference only if another recipe
    sets it.
    """
    having = [number for number, values in enumerate(settings) if key in values]
    values = [settings[number][key] for number in having]
    if any(value != values[0] for value in values):
        return True
    lacking = [values for values in settings if values and key not in values]
    given = [recipes[number]["origins"].get(key) not in ASSUMED for number in having]
    return bool(lacking) and any(given)


def _entry(reader: ArtifactReader, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of one run, without comparisons."""
    state = state_of(reader.run)
    notes = [*(str(fault) for fault in reader.faults), *document["warnings"]]
    if state.name != "finished":
        notes.insert(0, state.words)
    losses = _losses(document["train"])
    if losses is None:
        notes.append("no training metrics")
    if not document["eval"]:
        notes.append("no evaluation")
    export = document["export"] or {}
    info = (document["train"] or {}).get("info") or {}
    peaks = [entry["peak_memory_bytes"] for entry in document["timings"]["stages"].values()]
    splits = (document["data"] or {}).get("splits") or {}
    return {
        "run": str(document["run"]),
        "folder": str(reader.run),
        "status": document["status"],
        "state": state.name,
        "training_rows": (splits.get("train") or {}).get("rows"),
        "losses": losses,
        "delta": None,
        "scores": _scores(document["eval"]),
        "survival": document["survival"],
        "trainable_parameters": info.get("trainable_parameters"),
        "seconds": document["timings"]["total_seconds"],
        "train_seconds": info.get("seconds", _seconds_so_far(document["train"])),
        "peak_memory_bytes": max(filter(is_number, peaks), default=None),
        "model_bytes": (export.get("quantized") or {}).get("bytes"),
        "disk_bytes": disk_bytes(reader.run),
        "notes": notes,
    }


def _seconds_so_far(train: Mapping[str, Any] | None) -> float | None:
    """Return how long an unfinished training took up to its last report."""
    told = [line.get("seconds") for line in (train or {}).get("metrics", []) if is_report(line)]
    return next((value for value in reversed(told) if is_number(value)), None)


def _losses(train: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the losses of a finished or unfinished training, None when none was reported.

    `gap` is the final validation loss minus the final training loss. `best` is the lowest
    validation loss, at `best_iteration` of `iterations`.
    """
    if train is None or not train["metrics"]:
        return None
    metrics, info = train["metrics"], train["info"] or {}
    reports = [line for line in metrics if is_report(line) and is_number(line.get("loss"))]
    validations = [
        line for line in metrics if line.get("kind") == "validation" and is_number(line.get("loss"))
    ]
    none: dict[str, Any] = {}
    best = min(validations, key=lambda line: float(line["loss"]), default=none)
    final_train = info.get("final_train_loss", reports[-1]["loss"] if reports else None)
    final = info.get("final_validation_loss", validations[-1]["loss"] if validations else None)
    counted = info.get("iterations") or (reports or validations or [{}])[-1].get("iterations")
    return {
        "first_validation": validations[0]["loss"] if validations else None,
        "validation": final,
        "train": final_train,
        "gap": final - final_train if is_number(final) and is_number(final_train) else None,
        "best": best.get("loss"),
        "best_iteration": best.get("iteration"),
        "iteration": (reports or validations or [{}])[-1].get("iteration"),
        "iterations": counted,
        "finished": bool(info),
    }


def _scores(suites: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return suite -> column -> mean, n, low, high, in the columns' order."""
    keys = ("mean", "n", "low", "high")
    return {
        suite: {
            name: {**{key: columns[name].get(key) for key in keys}, "paired": None}
            for name in ordered_columns(columns)
        }
        for suite, columns in (suites or {}).items()
    }


def _label(entries: Sequence[dict[str, Any]]) -> None:
    """Name runs of one name, from several places, by their folders."""
    names = [entry["run"] for entry in entries]
    for entry, name in zip(entries, names, strict=True):
        if names.count(name) > 1:
            entry["run"] = entry["folder"]


def _set_against_first(entries: Sequence[dict[str, Any]]) -> None:
    first = (entries[0]["losses"] or {}).get("validation")
    for entry in entries[1:]:
        own = (entry["losses"] or {}).get("validation")
        if is_number(first) and is_number(own):
            entry["delta"] = own - first


def _pair(
    entry: dict[str, Any], first: Mapping[str, Any], reader: ArtifactReader, base: ArtifactReader
) -> None:
    """Judge each column of a run against the same column of the first run, prompt by prompt.

    p is corrected over the suites.
    """
    if reader is base:
        return
    scorers, base_scorers = _scorers(reader), _scorers(base)
    logs: dict[str, dict[str, tuple[Records, Records]]] = {}
    for suite, columns in entry["scores"].items():
        if suite not in first["scores"]:
            entry["notes"].append(f"{suite} was not asked in {first['run']}")
            continue
        known = suite in scorers and suite in base_scorers
        if known and scorers[suite] != base_scorers[suite]:
            entry["notes"].append(f"{suite} is scored otherwise than in {first['run']}")
            continue
        for column in columns:
            mine, theirs = (_answers(each, suite, column) for each in (reader, base))
            logs.setdefault(column, {})[suite] = mine, theirs
    for column, by_suite in logs.items():
        for suite, judged in compare_logs(by_suite).items():
            result = entry["scores"][suite][column]
            result["paired"] = judged
            if judged["n"] < (result["n"] or 0):
                entry["notes"].append(
                    f"{suite}, {column}: {judged['n']} of {result['n']} prompts are those of "
                    f"{first['run']}"
                )
    for suite in first["scores"]:
        if entry["scores"] and suite not in entry["scores"]:
            entry["notes"].append(f"{suite} was not asked")


def _answers(reader: ArtifactReader, suite: str, column: str) -> Records:
    return reader.json_lines(f"{reader.folder('eval')}/{suite}/{column}.jsonl")


def _scorers(reader: ArtifactReader) -> dict[str, Any]:
    """Return suite -> how it is scored, of the suites whose results say so."""
    results = reader.json(f"{reader.folder('eval')}/results.json") or {}
    info = results.get("suite_info") or {}
    return {
        suite: entry["scorer"]
        for suite, entry in info.items()
        if isinstance(entry, dict) and "scorer" in entry
    }


def _sources(document: Mapping[str, Any]) -> Any:
    split = ((document["data"] or {}).get("splits") or {}).get("valid") or {}
    return [
        split.get("rows"),
        split.get("tokens"),
        [s.get("sha256") for s in split.get("sources") or []],
    ]


def _loss_notes(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    trained = [document for document in documents if document["train"] and document["data"]]
    first = trained[0] if trained else None
    others = [d["run"] for d in trained[1:] if first and _sources(d) != _sources(first)]
    if not others or first is None:
        return []
    return [
        f"validation rows differ from those of {first['run']} in {', '.join(others)}: their losses "
        "are of other rows"
    ]


def _base_notes(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    models = {(document["model"] or {}).get("revision") for document in documents} - {None}
    return ["the runs start from different base models"] if len(models) > 1 else []


def form_of(form: Format | None, output: Path | None) -> Callable[[Mapping[str, Any]], str]:
    """Return the writer of a format, or of the format that the output's ending names."""
    ending: Format = ENDINGS.get(output.suffix.lower(), "text") if output is not None else "text"
    return WRITERS[form or ending]


def write_comparison(output: Path, text: str) -> None:
    """Write a comparison, so that a reader sees the old or the new file whole."""
    fresh = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        fresh.write_text(text, encoding="utf-8", newline="\n")
        fresh.replace(output)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        found = f"cannot be written ({error.strerror})"
        raise RunError(Fault(str(output), found, "name another file with --output")) from error
