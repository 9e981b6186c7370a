"""One line a sample: written as each answer ends, found again after a crash.

Does: append rows to a JSONL file so that a killed process loses none that was written, cut off a
torn end, and replace the file by one in order. Does not: know what a row means, except its `key`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mlx_ft.system.files import replacing

Row = dict[str, Any]

# Readers that use str.splitlines would cut a line at these.
_LINE_SEPARATORS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}


def json_line(row: Mapping[str, Any]) -> bytes:
    """Return a row as one line of UTF-8 JSON; any text is kept, lone surrogates as escapes."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False).translate(_LINE_SEPARATORS)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def recover(path: Path) -> list[Row]:
    """Return the rows of a log and cut off what follows the last whole one.

    Only a crash leaves such a rest: half a line, or blocks that were never written.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    rows: list[Row] = []
    good_bytes = 0
    for line in content.splitlines(keepends=True):
        row = _row(line)
        if row is None:
            break
        rows.append(row)
        good_bytes += len(line)
    if good_bytes < len(content):
        os.truncate(path, good_bytes)
    return rows


def append(stream: BinaryIO, row: Mapping[str, Any]) -> None:
    """Write one row and wait until the disk has it."""
    stream.write(json_line(row))
    stream.flush()
    os.fsync(stream.fileno())


def rewrite(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the log by these rows, so that a reader sees the old or the new file whole."""
    with replacing(path) as fresh:
        fresh.write_bytes(b"".join(json_line(row) for row in rows))


def _row(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("key"), str) else None
