"""The runs in a folder, and what each is doing now: running, dead, interrupted, finished, failed.

Does: find run folders, tell a running one from one whose process is gone, add up scores and disk.
Does not: change anything, or judge how good a run is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault, RunError
from mlx_ft.hardware import format_seconds
from mlx_ft.liveness import worked_on
from mlx_ft.report.reading import ArtifactReader, metrics_place
from mlx_ft.report.summary import read_document
from mlx_ft.report.text import one_line
from mlx_ft.report.verdict import is_report, ordered_columns
from mlx_ft.run_states import State
from mlx_ft.runs import MANIFEST, read_json

SCHEMA = 1
# Without a lock to ask: silence after which a run that says it is running is taken for dead.
SILENT_SECONDS = 1800.0
RECORDED: Mapping[str, State] = {
    "done": "finished",
    "stopped": "stopped",
    "interrupted": "interrupted",
    "gate_failed": "gate_failed",
    "failed": "failed",
}
SIGNS_OF_LIFE = (
    "run.json",
    "train.control/heartbeat.json",
    "train.tmp/metrics.jsonl",
    "data.tmp",
    "export.tmp",
    "eval.tmp",
)


@dataclass(frozen=True)
class RunState:
    """What a run is doing: the state's `name`, `words` with the reason or what it is at, and the
    `seconds_left` of a training.
    """

    name: State
    words: str
    seconds_left: float | None = None


def run_folders(root: Path) -> list[Path]:
    """Return the run folders in `root`, the newest first; RunError when there is no such folder."""
    if not root.is_dir():
        raise RunError(Fault(str(root), "no such folder", "name the folder with --runs FOLDER"))
    found = [path for path in root.iterdir() if path.is_dir() and is_run(path)]
    return sorted(found, key=lambda path: (-_created(path), path.name))


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's: it has a record or a resolved recipe."""
    return any((folder / name).is_file() for name in ("run.json", "recipe.json"))


def _created(run: Path) -> float:
    created = _record(run).get("created")
    return float(created) if isinstance(created, (int, float)) else 0.0


def _record(run: Path) -> Mapping[str, Any]:
    try:
        record = read_json(run / "run.json")
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def state_of(run: Path, now: float | None = None) -> RunState:
    """Return what a run is doing at `now` (seconds since 1970; the present when left out)."""
    record = _record(run)
    status, reason = str(record.get("status")), record.get("exit_reason")
    if status != "running":
        name = RECORDED.get(status, "unknown")
        told = one_line(str(reason), 160) if reason and reason != status else ""
        words = {"gate_failed": "stopped by a gate", "unknown": "no record of how it ended"}
        return RunState(name, ": ".join(filter(None, (words.get(name, name), told))))
    now = time.time() if now is None else now
    silent = now - last_sign(run)
    held = worked_on(run)
    if held is False:
        return RunState("dead", f"its process is gone, since {format_seconds(silent)} or less")
    if held is None and silent > SILENT_SECONDS:
        return RunState("dead", f"no sign of life for {format_seconds(silent)}")
    return _running(run, now)


def last_sign(run: Path) -> float:
    """Return when something of a run was last written, in seconds since 1970; 0 for never."""
    times = [0.0]
    for name in SIGNS_OF_LIFE:
        path = run / name
        if path.is_dir():
            times += [entry.stat().st_mtime for entry in path.rglob("*")]
        if path.exists():
            times.append(path.stat().st_mtime)
    return max(times)


def _running(run: Path, now: float) -> RunState:
    """Return what a running run is at; a training knows its pace."""
    stage = unfinished_stage(run)
    place = metrics_place(run, ("train.tmp",)) if stage == "train" else None
    if place is None or place.finished:
        return RunState("running", f"at {stage}")
    name = f"{place.folder}/metrics.jsonl"
    reports = [line for line in ArtifactReader(run).json_lines(name) if is_report(line)]
    if not reports:
        return RunState("running", f"at {stage}")
    last, measured = reports[-1], (run / name).stat().st_mtime
    left = max(0.0, float(last.get("seconds_left") or 0.0) - (now - measured))
    what, of = ("training", "") if place.seed is None else (f"seed {place.seed}", " of it")
    words = f"{what}, iteration {last.get('iteration')} of {last.get('iterations')}"
    return RunState("running", f"{words}, {format_seconds(left)} left{of}", left)


def unfinished_stage(run: Path) -> str:
    """Return the stage that a run is at, as far as its folder shows."""
    for stage in ("eval", "export", "train", "data"):
        if (run / f"{stage}.tmp").is_dir() and not (stage == "eval" and _base_only(run)):
            return stage
    recorded = _record(run).get("stages") or {}
    return (
        "preflight" if "preflight" not in recorded else "base" if _base_only(run) else "its start"
    )


def _base_only(run: Path) -> bool:
    """Return whether only the base model was asked so far, as it is before training."""
    return not (run / "export" / MANIFEST).exists()


def disk_bytes(folder: Path) -> int:
    """Return the bytes of all files of a folder; links count for nothing, and what goes while it is
    counted is left out.
    """
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(root, name)
            try:
                total += 0 if os.path.islink(path) else os.path.getsize(path)
            except OSError:
                continue
    return total


def run_entry(run: Path) -> dict[str, Any]:
    """Return what a list says of a run, as plain JSON; what cannot be read is null."""
    document = read_document(ArtifactReader(run))
    state = state_of(run)
    timings = document["timings"]
    scores = {}
    for suite, columns in (document["eval"] or {}).items():
        names = ordered_columns(columns)
        if names:
            scores[suite] = {
                "first": {"column": names[0], "mean": columns[names[0]].get("mean")},
                "last": {"column": names[-1], "mean": columns[names[-1]].get("mean")},
            }
    info = (document["train"] or {}).get("info") or {}
    return {
        "run": str(document["run"]),
        "folder": str(run),
        "state": state.name,
        "words": state.words,
        "seconds_left": state.seconds_left,
        "created": timings["created"],
        "updated": timings["updated"],
        "seconds": timings["total_seconds"],
        "model": (document["model"] or {}).get("name"),
        "validation_loss": info.get("final_validation_loss"),
        "scores": scores,
        "disk_bytes": disk_bytes(run),
    }


def list_runs(
    root: Path, states: Sequence[str] = (), names: Sequence[str] = (), newest: int | None = None
) -> list[dict[str, Any]]:
    """Return the runs in `root`, the newest first: those in one of `states` whose name has one of
    the patterns `names` (as a shell has them, or a part of the name); all, when none is given.
    """
    found = []
    for run in run_folders(root):
        if names and not any(fnmatchcase(run.name, f"*{pattern}*") for pattern in names):
            continue
        if states and state_of(run).name not in states:
            continue
        found.append(run_entry(run))
        if newest is not None and len(found) == newest:
            break
    return found
