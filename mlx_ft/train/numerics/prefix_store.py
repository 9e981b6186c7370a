"""Storage of the frozen layers' outputs: in memory, or in a file that later runs find again.

Does: hold one array (tokens, hidden) per row; write a file completely or not at all, under a key of
everything its content depends on; remove the least recently used files. Does not: compute the
arrays or the key.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_ft.runs.folder import read_manifest, seal, verify_files
from mlx_ft.system.files import flush_to_disk

STATES_FILE = "states.bin"
# Kept for later runs, all together; the file of the run itself comes on top.
KEPT_BYTES = 10 << 30
# A file may take this share of what is free on its disk.
FREE_SHARE = 0.25
# An unfinished file that is this old was left by a process that died (seconds).
ABANDONED_SECONDS = 3600.0


class Store(Protocol):
    """Arrays of rows, for reading."""

    held_bytes: int

    def __contains__(self, row: int) -> bool: ...

    def get(self, row: int) -> mx.array:
        """Return the states (tokens, hidden) of a row that is held."""


class MemoryStore:
    """Arrays in memory, up to a limit."""

    def __init__(self, limit_bytes: int) -> None:
        self.held_bytes = 0
        self._limit_bytes = limit_bytes
        self._rows: dict[int, mx.array] = {}

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def put(self, states: Mapping[int, mx.array]) -> bool:
        """Keep the states of some rows, or none of them; return whether they are kept."""
        size = sum(array.nbytes for array in states.values())
        if self.held_bytes + size > self._limit_bytes:
            return False
        self._rows.update(states)
        self.held_bytes += size
        return True

    def get(self, row: int) -> mx.array:
        return self._rows[row]


@dataclass(frozen=True)
class Place:
    """A file's place: the cache's folder, and the key of what the file holds."""

    folder: Path
    key: str

    @property
    def path(self) -> Path:
        return self.folder / self.key


@dataclass(frozen=True, eq=False)
class Layout:
    """Layout of rows in a file: one after the other, each (tokens, hidden).

    starts: byte offsets, [rows + 1].
    hidden: width of a state.
    dtype: type of the numbers.
    """

    starts: npt.NDArray[np.int64]
    hidden: int
    dtype: mx.Dtype

    @staticmethod
    def of(tokens: npt.NDArray[np.int64], hidden: int, dtype: mx.Dtype) -> Layout:
        """Return the layout of rows with these numbers of tokens."""
        starts = np.concatenate([[0], np.cumsum(tokens)]) * hidden * dtype.size
        return Layout(starts, hidden, dtype)

    @property
    def size_bytes(self) -> int:
        """Size of the whole file (bytes)."""
        return int(self.starts[-1])


class DiskStore:
    """Arrays in a complete, memory-mapped file; the system keeps as much in memory as fits."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self._layout = layout
        self._states = np.memmap(path, np.uint8, mode="r")
        self.held_bytes = layout.size_bytes

    def __contains__(self, row: int) -> bool:
        return 0 <= row < len(self._layout.starts) - 1

    def get(self, row: int) -> mx.array:
        layout = self._layout
        raw = mx.array(self._states[layout.starts[row] : layout.starts[row + 1]])
        array: mx.array = mx.view(raw, layout.dtype).reshape(-1, layout.hidden)
        return array


def remove_damaged(place: Place) -> None:
    """Remove an earlier run's file whose content differs from its manifest; the whole file is read.

    Training on such a file would raise no error.
    """
    if read_manifest(place.path) is not None and verify_files(place.path):
        shutil.rmtree(place.path, ignore_errors=True)


def find_on_disk(place: Place, tokens: npt.NDArray[np.int64]) -> DiskStore | None:
    """Return the complete file of a run, or None; set its time of use."""
    manifest = read_manifest(place.path)
    if manifest is None or manifest.inputs != place.key:
        return None
    info: Mapping[str, Any] = manifest.info
    layout = Layout.of(tokens, info["hidden"], getattr(mx, info["dtype"]))
    file = place.path / STATES_FILE
    if layout.size_bytes == 0 or file.stat().st_size != layout.size_bytes:
        return None
    with contextlib.suppress(OSError):  # a cache that may only be read serves as well
        os.utime(place.path)
    return DiskStore(file, layout)


class DiskWriter:
    """Writer of an unfinished file; `finish` completes it for this run and later ones.

    The caller handles the OSError of a full or read-only disk; `give_up` then removes the file.
    """

    def __init__(self, place: Place, layout: Layout) -> None:
        self._place = place
        self._layout = layout
        self._partial = place.folder / f"{place.key}.{os.getpid()}.tmp"
        self._partial.mkdir(parents=True, exist_ok=True)
        # Plain writes: a memory map of a file on a full disk ends the process.
        self._stream = (self._partial / STATES_FILE).open("wb")

    def put(self, states: Mapping[int, mx.array]) -> None:
        """Write the states of some rows where they belong."""
        for row, array in states.items():
            self._stream.seek(int(self._layout.starts[row]))
            self._stream.write(np.array(mx.view(array, mx.uint8)).tobytes())

    def finish(self) -> None:
        """Flush, seal and rename; the file of a faster process stays."""
        self._stream.close()
        info = {"hidden": self._layout.hidden, "dtype": str(self._layout.dtype).rsplit(".", 1)[-1]}
        seal(self._partial, "prefix", self._place.key, info)
        if read_manifest(self._place.path) is None:  # an incomplete folder blocks the rename
            shutil.rmtree(self._place.path, ignore_errors=True)
        try:
            self._partial.replace(self._place.path)
            flush_to_disk(self._place.folder)
        except OSError:
            self.give_up()
        make_room(self._place.folder, KEPT_BYTES, self._place.key)

    def give_up(self) -> None:
        """Remove the unfinished file."""
        with contextlib.suppress(OSError):
            self._stream.close()
        shutil.rmtree(self._partial, ignore_errors=True)


def fits_on_disk(folder: Path, needed_bytes: int) -> bool:
    """Return whether a file of this size may be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return needed_bytes <= FREE_SHARE * shutil.disk_usage(folder).free
    except OSError:
        return False


def make_room(folder: Path, limit_bytes: int, keep: str) -> None:
    """Remove the least recently used files until the rest is within the limit, never `keep`.

    Unfinished files of dead processes are removed too.
    """
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            files = [file.stat() for file in path.iterdir()]
            if not path.name.endswith(".tmp"):
                found.append((path.stat().st_mtime, sum(file.st_size for file in files), path))
            elif time.time() - max(s.st_mtime for s in (path.stat(), *files)) > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit_bytes:
            return
        if path.name != keep:
            shutil.rmtree(path, ignore_errors=True)
            total -= size
