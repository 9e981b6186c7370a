"""All runs of a folder, with state, scores and disk use of each.

Does not: change anything, or judge a run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault, RunError
from mlx_ft.runs.document import ordered_columns, read_document
from mlx_ft.runs.folder import is_run
from mlx_ft.runs.reader import ArtifactReader
from mlx_ft.runs.state import record_of, state_of

SCHEMA = 1


def run_folders(root: Path) -> list[Path]:
    """Return the run folders in `root`, the newest first. Raises RunError if `root` is missing."""
    if not root.is_dir():
        raise RunError(Fault(str(root), "no such folder", "name the folder with --runs FOLDER"))
    found = [path for path in root.iterdir() if path.is_dir() and is_run(path)]
    return sorted(found, key=lambda path: (-_created(path), path.name))


def _created(run: Path) -> float:
    created = record_of(run).get("created")
    return float(created) if isinstance(created, (int, float)) else 0.0


def disk_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder.

    Links count as 0. Files that are deleted meanwhile are left out.
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
    """Return the entry of a run in the list, as plain JSON. Unreadable values are null."""
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
    """Return the runs in `root`, the newest first.

    states: only runs in one of these states. Empty: all.
    names: only runs whose name has one of these patterns or parts. Empty: all.
    newest: at most this many (None: all).
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
