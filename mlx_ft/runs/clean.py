"""Find, list and, on request, delete files that runs no longer need.

Does: find old checkpoints, fused models, remains of dead processes, outdated outputs of frozen
layers, and failed runs. A crash while deleting leaves every run whole.
Does not: touch a run in progress, its best or a pinned checkpoint, an adapter, a quantized model,
or a kind that was not asked for.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ft.errors import MlxFtError, RunError
from mlx_ft.runs.folder import MANIFEST, forget_files, is_run, no_run, read_manifest
from mlx_ft.runs.listing import disk_bytes, run_folders
from mlx_ft.runs.lock import working
from mlx_ft.runs.names import KEPT_STAGES
from mlx_ft.runs.state import last_sign, state_of
from mlx_ft.system.cache import cache_home
from mlx_ft.system.console import Console
from mlx_ft.system.files import read_json
from mlx_ft.text.quantities import format_bytes
from mlx_ft.text.safe import printable

DAY_SECONDS = 86400.0
# Stages that go on from what an interruption left; the others begin anew.
CONTINUED = ("train", "eval")
# A left-over that nobody has written to for so long was left by a process that died.
ABANDONED_SECONDS = 3600.0
DOOMED = ".removing"  # ending of a run folder that is on its way out
PINNED = ".pinned"


@dataclass(frozen=True)
class Rubbish:
    """A file or folder that can be deleted.

    kind: a key of KINDS.
    path: where it is.
    size_bytes: its size.
    why: the reason, in words.
    run: its run folder, locked while it is deleted (None outside of runs).
    """

    kind: str
    path: Path
    size_bytes: int
    why: str
    run: Path | None = None


def find_rubbish(
    root: Path, runs: Sequence[Path], kinds: Sequence[str], older_than_days: float
) -> list[Rubbish]:
    """Return everything of these kinds that can be deleted.

    root: folder of runs to search, if `runs` is empty. Then the cache is searched too.
    runs: run folders to search.
    older_than_days: minimum age of failed runs and cache entries since their last change.
    Raises RunError for a named folder that is no run, and for a missing `root`.
    """
    wanted = [kind for kind in KINDS if kind in kinds]
    before = time.time() - older_than_days * DAY_SECONDS
    faults = [no_run(run) for run in runs if not is_run(run)]
    if faults:
        raise RunError(faults)
    in_runs = any(kind != "prefix" for kind in wanted)
    folders = list(runs) or (run_folders(root) if in_runs else [])
    found: list[Rubbish] = []
    for run in folders:
        if not run.is_symlink() and state_of(run).name != "running":
            for kind in wanted:
                found += KINDS[kind].of_run(run, before)
    doomed = {each.path for each in found if each.kind == "failed"}
    found = [each for each in found if each.kind == "failed" or each.run not in doomed]
    if "prefix" in wanted and not runs:
        found += old_prefixes(cache_home() / "prefix", before)
    if "stale" in wanted and not runs:
        found += [
            Rubbish("stale", path, disk_bytes(path), "a run that was being removed")
            for path in sorted(root.glob(f"*{DOOMED}"))
        ]
    return found


def _checkpoints(run: Path, before: float) -> Iterator[Rubbish]:
    """Yield all checkpoints except the best, the pinned and the resumable ones.

    Resumable: the newest checkpoint of an unfinished training.
    """
    for stage in ("train", "train.tmp"):
        folder = run / stage / "checkpoints"
        if not folder.is_dir() or folder.is_symlink():
            continue
        names = sorted(path.name for path in folder.iterdir() if path.name.isdigit())
        kept = kept_checkpoints(run / stage, names)
        for name in names:
            if name not in kept:
                why = "an older checkpoint" if stage != "train" else "the training is finished"
                yield _piece("checkpoints", folder / name, why, run)


def kept_checkpoints(stage: Path, names: Sequence[str]) -> set[str]:
    """Return the checkpoints of a training to keep.

    These are pinned ones and the best one, by the stage's manifest or by the newest checkpoint. The
    newest one is kept too if the training may continue or no best one is known.
    """
    folder = stage / "checkpoints"
    manifest = read_manifest(stage)
    info: Mapping[str, Any] = manifest.info if manifest is not None else {}
    states = [_json(folder / name / "state.json") for name in names[-1:]]
    told = [value for each in (info, *states) for key, value in each.items() if _is_choice(key)]
    iterations = {int(value) for value in told if isinstance(value, int) and value > 0}
    kept = {name for name in names if int(name) in iterations}
    if manifest is None or not kept:
        kept.update(names[-1:])
    return kept | {name for name in names if (folder / f"{name}{PINNED}").exists()}


def _is_choice(key: str) -> bool:
    return key.endswith("_iteration")


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _fused(run: Path, before: float) -> Iterator[Rubbish]:
    """Yield the 16-bit model of a finished run that has a quantized one as well."""
    manifest = read_manifest(run / "export")
    if manifest is None or state_of(run).name != "finished":
        return
    paths = [(manifest.info.get(name) or {}).get("path") for name in ("fused", "quantized")]
    if all(isinstance(path, str) and (run / "export" / path).is_dir() for path in paths):
        why = "the quantized model is there, and `mlx-ft run` made both"
        yield _piece("fused", run / "export" / str(paths[0]), why, run)


def _stale(run: Path, before: float) -> Iterator[Rubbish]:
    """Yield remains of dead processes: unfinished stages that restart anew, half-written files."""
    for stage in KEPT_STAGES:
        partial = run / f"{stage}.tmp"
        over = (run / stage / MANIFEST).exists() or stage not in CONTINUED
        if partial.is_dir() and over:
            yield _piece("stale", partial, "an unfinished stage that would begin anew", run)
    for pattern in (".*.tmp", "*/.*.tmp", "train*/checkpoints/*.tmp"):
        for path in sorted(run.glob(pattern)):
            if not path.is_symlink() and time.time() - _changed(path) > ABANDONED_SECONDS:
                yield _piece("stale", path, "half-written", run)


def _failed(run: Path, before: float) -> Iterator[Rubbish]:
    """Yield a whole run that failed or that a gate stopped, unless a checkpoint of it is pinned."""
    state = state_of(run)
    pinned = any(run.glob(f"train*/checkpoints/*{PINNED}"))
    if state.name in ("failed", "gate_failed") and last_sign(run) < before and not pinned:
        yield Rubbish("failed", run, disk_bytes(run), state.words, run)


def _nothing(run: Path, before: float) -> Iterator[Rubbish]:
    return iter(())


def old_prefixes(folder: Path, before: float) -> Iterator[Rubbish]:
    """Yield outputs of frozen layers that no run has used since `before`, and half-written ones."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.is_symlink():
            continue
        used = _changed(path)
        if path.name.endswith(".tmp"):
            if time.time() - used > ABANDONED_SECONDS:
                yield _piece("prefix", path, "half-written", None)
        elif path.stat().st_mtime < before:
            days = (time.time() - path.stat().st_mtime) / DAY_SECONDS
            yield _piece("prefix", path, f"not used for {days:.0f} days", None)


def _changed(path: Path) -> float:
    """Return when a file, or the newest file of a folder, was last written."""
    inside = path.rglob("*") if path.is_dir() else ()
    return max((entry.lstat().st_mtime for entry in (path, *inside)), default=0.0)


def _piece(kind: str, path: Path, why: str, run: Path | None) -> Rubbish:
    size = disk_bytes(path) if path.is_dir() else path.stat().st_size
    return Rubbish(kind, path, size, why, run)


@dataclass(frozen=True)
class Kind:
    """One kind of rubbish.

    words: its description.
    of_run: finds it in a run. Arguments: run folder, time (seconds since 1970) that old files
    precede.
    """

    words: str
    of_run: Callable[[Path, float], Iterator[Rubbish]]


KINDS: Mapping[str, Kind] = {
    "checkpoints": Kind("checkpoints that no training goes on from", _checkpoints),
    "fused": Kind("16-bit models of finished runs", _fused),
    "stale": Kind("left-overs of processes that died", _stale),
    "prefix": Kind("outputs of frozen layers that no run has used lately", _nothing),
    "failed": Kind("whole runs that failed", _failed),
}


def remove(rubbish: Rubbish) -> None:
    """Delete one thing. Raises RunError if a process is working on its run.

    Files leave the stage's manifest before they are deleted, and a run is renamed first. So after a
    crash everything is whole or gone.
    """
    if rubbish.run is None or not rubbish.run.is_dir():
        _delete(rubbish.path)
        return
    with working(rubbish.run):
        if rubbish.kind == "failed":
            doomed = rubbish.path.with_name(f"{rubbish.path.name}{DOOMED}")
            rubbish.path.rename(doomed)
            _delete(doomed)
            return
        _take_out(rubbish.run, rubbish.path)


def drop_fused(run: Path) -> None:
    """Remove the 16-bit model of a finished run that this process works on."""
    for each in _fused(run, 0.0):
        _take_out(run, each.path)


def _take_out(run: Path, path: Path) -> None:
    stage = run / path.relative_to(run).parts[0]
    if path != stage and stage.is_dir():
        forget_files(stage, path.relative_to(stage).as_posix())
    _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_all(
    found: Sequence[Rubbish], console: Console
) -> tuple[int, list[MlxFtError | OSError]]:
    """Delete everything possible. Return the freed bytes and the errors."""
    freed, errors = 0, list[MlxFtError | OSError]()
    for each in found:
        try:
            remove(each)
        except (MlxFtError, OSError) as error:
            errors.append(error)
            console.say(f"{each.path}: not removed ({error})")
            continue
        freed += each.size_bytes
    return freed, errors


def listing(found: Sequence[Rubbish]) -> list[str]:
    """Return lines for each kind, with its total size and every piece of it."""
    lines = []
    for name, kind in KINDS.items():
        pieces = [each for each in found if each.kind == name]
        if not pieces:
            continue
        total = sum(each.size_bytes for each in pieces)
        lines.append(f"--{name}: {kind.words}, {format_bytes(total)}")
        lines += [
            printable(f"  {format_bytes(each.size_bytes):>10}  {each.path}  ({each.why})")
            for each in sorted(pieces, key=lambda each: -each.size_bytes)
        ]
    total = sum(each.size_bytes for each in found)
    lines.append(f"in all {format_bytes(total)}" if found else "nothing to remove")
    return lines


def sum_line(freed_bytes: int) -> str:
    """Return the line that says how much was freed."""
    return f"freed {format_bytes(freed_bytes)}"
