"""State of a run: running, dead, interrupted, stopped, finished, failed or stopped by a gate."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ft.runs.document import is_report
from mlx_ft.runs.folder import MANIFEST
from mlx_ft.runs.lock import worked_on
from mlx_ft.runs.metrics import metrics_place
from mlx_ft.runs.names import State
from mlx_ft.runs.reader import ArtifactReader
from mlx_ft.system.files import read_json
from mlx_ft.text.quantities import format_seconds
from mlx_ft.text.safe import one_line

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
    """State of a run.

    name: the state.
    words: with the reason, or with the current stage.
    seconds_left: of a training (None: unknown).
    """

    name: State
    words: str
    seconds_left: float | None = None


def record_of(run: Path) -> Mapping[str, Any]:
    try:
        record = read_json(run / "run.json")
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def state_of(run: Path, now: float | None = None) -> RunState:
    """Return the state of a run. now: seconds since 1970 (None: the present)."""
    record = record_of(run)
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
    """Return the time of the last write to a run (seconds since 1970), or 0."""
    times = [0.0]
    for name in SIGNS_OF_LIFE:
        path = run / name
        if path.is_dir():
            times += [entry.stat().st_mtime for entry in path.rglob("*")]
        if path.exists():
            times.append(path.stat().st_mtime)
    return max(times)


def _running(run: Path, now: float) -> RunState:
    """Return the state of a running run, with the time left of a training."""
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
    recorded = record_of(run).get("stages") or {}
    return (
        "preflight" if "preflight" not in recorded else "base" if _base_only(run) else "its start"
    )


def _base_only(run: Path) -> bool:
    """Return whether only the base model was asked so far, as it is before training."""
    return not (run / "export" / MANIFEST).exists()
