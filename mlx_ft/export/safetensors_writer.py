"""Write safetensors a few rows at a time, so that a whole model is never in memory.

Does: lay out shards and their index, write rows in any order, give a file its name once it is
complete on the disk. Does not: compute weights, or write anything else.

The format: 8 bytes of header length, a JSON header (name -> dtype, shape, offsets), then the data
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_ft.system.files import sync

MAX_SHARD_BYTES = 2 << 30
# Numbers in float32 that are computed at a time (bytes).
PART_BYTES = 32 << 20
# Matches none of the patterns by which mlx-lm and others find weights in a model folder.
UNFINISHED = ".part"
DTYPE_NAMES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
    mx.int32: "I32",
    mx.int64: "I64",
    mx.bool_: "BOOL",
}


def flat_rows(shape: tuple[int, ...]) -> int:
    """Return the number of rows of a tensor: all axes but the last flattened; a vector is one."""
    return math.prod(shape[:-1])


@dataclass(frozen=True)
class Layout:
    """One tensor as it will be stored."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.size)

    @property
    def row_bytes(self) -> int:
        return self.size_bytes // max(1, flat_rows(self.shape))


def shards(layouts: Mapping[str, Layout], limit_bytes: int) -> list[list[str]]:
    """Return tensor names in order, by file of at most `limit_bytes` and at least one tensor."""
    found: list[list[str]] = []
    held = 0
    for name, layout in layouts.items():
        if not found or held + layout.size_bytes > limit_bytes:
            found.append([])
            held = 0
        found[-1].append(name)
        held += layout.size_bytes
    return found


def row_ranges(shape: tuple[int, ...], row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of a tensor's flat rows of at most PART_BYTES.

    No range has rows of two matrices of a stack.
    """
    at_a_time = max(1, PART_BYTES // max(1, row_bytes))
    matrix = shape[-2] if len(shape) > 1 else 1
    for begin in range(0, flat_rows(shape), matrix):
        for first in range(begin, begin + matrix, at_a_time):
            yield first, min(begin + matrix, first + at_a_time)


def array_bytes(array: mx.array) -> npt.NDArray[np.generic]:
    """Return an evaluated array as a NumPy array, without a copy; bfloat16 as 16-bit integers."""
    if array.dtype == mx.bfloat16:
        array = mx.view(array, mx.uint16)
    return np.array(array, copy=False)


class WeightsWriter:
    """Sharded safetensors with an index, in a folder; rows are written in any order.

    `finish` gives the files their names, once every row is on the disk.
    """

    def __init__(self, folder: Path, layouts: Mapping[str, Layout]) -> None:
        self._folder = folder
        self._layouts = layouts
        self._missing_rows = {name: flat_rows(each.shape) for name, each in layouts.items()}
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._files: dict[str, BinaryIO] = {}
        self._weight_map: dict[str, str] = {}
        parts = shards(layouts, MAX_SHARD_BYTES)
        for number, names in enumerate(parts, start=1):
            file = "model.safetensors"
            if len(parts) > 1:
                file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            self._begin(file, names)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for stream in self._files.values():
            stream.close()

    @property
    def size_bytes(self) -> int:
        return sum(layout.size_bytes for layout in self._layouts.values())

    def _begin(self, file: str, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
        begins: dict[str, int] = {}
        end = 0
        for name in names:
            layout = self._layouts[name]
            begins[name], end = end, end + layout.size_bytes
            header[name] = {
                "dtype": DTYPE_NAMES[layout.dtype],
                "shape": list(layout.shape),
                "data_offsets": [begins[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        stream = (self._folder / (file + UNFINISHED)).open("wb")
        self._files[file] = stream
        stream.write(len(text).to_bytes(8, "little") + text)
        data = stream.tell()
        stream.truncate(data + end)
        self._places.update({name: (stream, data + begins[name]) for name in names})
        self._weight_map.update(dict.fromkeys(names, file))

    def write(self, name: str, first_row: int, rows: mx.array) -> None:
        """Write evaluated rows (flat, from `first_row` on) of a tensor."""
        layout, (stream, begin) = self._layouts[name], self._places[name]
        assert rows.dtype == layout.dtype, f"{name} is {rows.dtype}, laid out as {layout.dtype}"
        assert rows.size * rows.dtype.size % max(1, layout.row_bytes) == 0, f"{name}: torn rows"
        if rows.size == 0:
            return
        stream.seek(begin + layout.row_bytes * first_row)
        stream.write(np.ascontiguousarray(array_bytes(rows)).data)
        self._missing_rows[name] -= int(rows.size * rows.dtype.size) // layout.row_bytes

    def finish(self) -> int:
        """Flush and name the files, write the index; return the size of the weights (bytes)."""
        torn = [name for name, missing in self._missing_rows.items() if missing]
        empty = [name for name in torn if self._layouts[name].size_bytes == 0]
        assert torn == empty, f"{torn[:3]} are not written as a whole"
        for file, stream in self._files.items():
            stream.flush()
            sync(stream.fileno())
            stream.close()
            (self._folder / (file + UNFINISHED)).replace(self._folder / file)
        index = {
            "metadata": {"total_size": self.size_bytes},
            "weight_map": dict(sorted(self._weight_map.items())),
        }
        text = json.dumps(index, indent=1)
        path = self._folder / "model.safetensors.index.json"
        path.write_text(text + "\n", encoding="utf-8")
        return self.size_bytes
