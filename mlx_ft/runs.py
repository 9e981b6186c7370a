"""The run folder: stages that are complete or do not exist, and a record of what happened.

Does: name run folders, write a stage into `<stage>.tmp`, flush it, write its manifest last and
rename; find out whether a stage is complete for given inputs; keep `run.json`.
Does not: know what is inside a stage, or what the stages are.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault, RunError

MANIFEST = "manifest.json"
SCHEMA = 1
# What a full, read-only or forbidden disk says.
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
)


@dataclass(frozen=True)
class Manifest:
    """What a complete stage folder says about itself.

    `inputs` is the hash of all that the stage depends on; `files` maps relative paths to
    {"sha256", "bytes"}; `info` is the stage's own hand-over (plain JSON).
    """

    stage: str
    inputs: str
    files: Mapping[str, Mapping[str, Any]]
    info: Mapping[str, Any]


def canonical_json(value: Any) -> str:
    """Return one text for equal values, so that it can be hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def hash_of(value: Any) -> str:
    """Return the sha256 of a JSON value, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def flush_to_disk(path: Path) -> None:
    """Make a file's or folder's content survive a power cut, as far as the system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield the name of a file to write; it is flushed and becomes `path`, unless something is
    raised, then it goes. A reader of `path` sees the old or the new file whole.

    `partial` is that name where the next attempt should write over what a killed one left.
    """
    fresh = partial or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield fresh
        flush_to_disk(fresh)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, so that a reader sees the old or the new file whole."""
    with replacing(path) as fresh, fresh.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False, allow_nan=False)
        stream.write("\n")


def read_json(path: Path) -> Any:
    """Return the JSON value in `path`; OSError and ValueError are the caller's."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a JSONL file; a torn last line (a crash) is left out."""
    if not path.exists():
        return []
    rows = []
    # Only a newline ends a line: a text may hold U+2028, where str.splitlines would cut. Bytes,
    # because a torn line may end inside a character.
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def seal(folder: Path, stage: str, inputs: str, info: Mapping[str, Any]) -> Manifest:
    """Flush every file of `folder` and write its manifest last; from then on it is complete.

    What killed processes were about to replace a file by (see `replacing`) goes first.
    """
    for left in [path for path in folder.rglob(".*.tmp") if path.is_file()]:
        left.unlink()
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = path.relative_to(folder).as_posix()
        if relative == MANIFEST:
            continue
        flush_to_disk(path)
        files[relative] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    for directory in [p for p in folder.rglob("*") if p.is_dir()]:
        flush_to_disk(directory)
    manifest = Manifest(stage, inputs, files, dict(info))
    write_json(folder / MANIFEST, {"schema": SCHEMA, **vars(manifest)})
    flush_to_disk(folder)
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a complete stage folder, or None when there is none to trust.

    Sizes are compared, not hashes: a folder is hashed when it is written and by `verify_files`.
    """
    try:
        value = read_json(folder / MANIFEST)
        if value["schema"] != SCHEMA:
            return None
        manifest = Manifest(value["stage"], value["inputs"], value["files"], value["info"])
        whole = all(
            (folder / name).stat().st_size == entry["bytes"] and isinstance(entry["sha256"], str)
            for name, entry in manifest.files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if whole else None


def forget_files(folder: Path, under: str) -> None:
    """Take the files at or below the relative path `under` out of a stage's manifest, and what its
    info says of them, so that they may go and the stage stays complete. A folder without a valid
    manifest is left alone.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    kept = {
        name: entry
        for name, entry in manifest.files.items()
        if name != under and not name.startswith(f"{under}/")
    }
    info = {
        key: None if isinstance(value, dict) and value.get("path") == under else value
        for key, value in manifest.info.items()
    }
    left = replace(manifest, files=kept, info=info)
    write_json(folder / MANIFEST, {"schema": SCHEMA, **vars(left)})
    flush_to_disk(folder)


def verify_files(folder: Path) -> list[Fault]:
    """Return a fault for every file of a stage whose content is not what its manifest says."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [Fault(str(folder), "no valid manifest", "delete the folder and run again")]
    return [
        Fault(str(folder / name), "content differs from its manifest", "delete the stage's folder")
        for name, entry in manifest.files.items()
        if file_sha256(folder / name) != entry["sha256"]
    ]


def complete_stage(run: Path, stage: str, inputs: str) -> Manifest | None:
    """Return the manifest of `run/stage` if it is complete and was made from these inputs."""
    manifest = read_manifest(run / stage)
    if manifest is None or manifest.stage != stage or manifest.inputs != inputs:
        return None
    return manifest


@contextlib.contextmanager
def writing_stage(run: Path, stage: str, *, keep_partial: bool = False) -> Iterator[Path]:
    """Yield `<run>/<stage>.tmp` to write into; the caller seals it, then it takes its final name.

    Left-overs of an earlier attempt are removed first, unless `keep_partial` (a stage that can
    continue them). On an error the partial folder stays for whoever looks into it, without a
    manifest and so without meaning.
    """
    partial = run / f"{stage}.tmp"
    if partial.exists() and not keep_partial:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    yield partial
    assert (partial / MANIFEST).exists(), f"stage {stage} was not sealed"
    final = run / stage
    if final.exists():
        shutil.rmtree(final)
    partial.replace(final)
    flush_to_disk(run)


def taken_over(run: Path, stage: str, inputs: str) -> Path | None:
    """Copy a stage from a run beside this one that made it whole from the same inputs; return that
    run, or None when there is none.
    """
    for other in sorted(run.parent.iterdir()):
        if other == run or complete_stage(other, stage, inputs) is None:
            continue
        if verify_files(other / stage):
            continue
        with writing_stage(run, stage) as folder:
            shutil.copytree(other / stage, folder, dirs_exist_ok=True)
        return other
    return None


def run_folder(runs_root: Path, recipe_name: str, identity: str) -> Path:
    """Return (and make) `<runs_root>/<recipe name>-<8 hex of identity>`.

    Raises RunError when it cannot be written or would lie outside `runs_root`.
    """
    folder = runs_root / f"{recipe_name}-{identity[:8]}"
    if folder.resolve().parent != runs_root.resolve():
        raise RunError(Fault(str(folder), "lies outside the runs folder", "choose another name"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(
            Fault(str(folder), f"cannot be written ({error.strerror})", "choose --runs FOLDER")
        ) from error
    return folder


def require_free_bytes(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raise RunError unless the disk under `folder` has `needed_bytes` free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise RunError(
            Fault(
                str(folder),
                f"{purpose} needs {needed_bytes / 1e9:.2f} GB, {free_bytes / 1e9:.2f} GB are free",
                "free some space or choose --runs FOLDER on another disk",
            )
        )


def update_record(run: Path, **changes: Any) -> dict[str, Any]:
    """Merge `changes` into `run.json` and return it; `stages` is merged one level deeper."""
    path = run / "run.json"
    try:
        record = read_json(path)
    except (OSError, ValueError):
        record = {"schema": SCHEMA, "run": run.name, "created": time.time(), "stages": {}}
    stages = {**record.get("stages", {}), **changes.pop("stages", {})}
    record.update(changes, stages=stages, updated=time.time())
    write_json(path, record)
    return dict(record)


@contextlib.contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a message; every other error passes."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise _disk_error(folder, error.strerror or str(error)) from error
    except RuntimeError as error:
        # MLX's writer has no type of its own for a full disk.
        if "[write]" not in str(error) and "Failed to open" not in str(error):
            raise
        raise _disk_error(folder, str(error)) from error


def _disk_error(folder: Path, reason: str) -> RunError:
    fix = "free some space or choose --runs FOLDER; what was finished is kept"
    return RunError(Fault(str(folder), f"cannot be written ({reason})", fix))
