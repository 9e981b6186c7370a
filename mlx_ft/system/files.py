"""Hashing, JSON, atomic replacement, flushing to disk, and disk errors as messages.

Does not: know the layout of a run folder (`runs/folder.py`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault, RunError
from mlx_ft.text.quantities import format_bytes

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
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Wait until the disk has an open file's content.

    macOS answers fsync once the drive's own memory has it; F_FULLFSYNC waits for the medium
    (fsync(2) of macOS). A disk without it, a network's for one, gets fsync.
    """
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
        except OSError:
            pass
        else:
            return
    os.fsync(descriptor)


@contextlib.contextmanager
def replacing(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield the name of a file to write, which replaces `path` when the block ends.

    A reader of `path` sees the old or the new file whole. If the block raises, the new file is
    deleted.
    partial: the name to write to, if the next attempt should overwrite the remains of a killed one.
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
    """Return the JSON value in `path`. OSError and ValueError are the caller's to handle."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a JSONL file. A torn last line (a crash) is left out."""
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


def require_free_bytes(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raise RunError unless the disk under `folder` has `needed_bytes` free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        need, free = format_bytes(needed_bytes), format_bytes(free_bytes)
        raise RunError(
            Fault(
                str(folder),
                f"{purpose} needs {need}, {free} are free",
                "free some space or choose --runs FOLDER on another disk",
            )
        )


@contextlib.contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a message. Other errors pass."""
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
