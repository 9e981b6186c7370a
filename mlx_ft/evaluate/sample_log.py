"""One JSON line per answer, crash-safe.

Does: append records so that a killed process loses none, cut off a torn end, rewrite the file in
order.
Does not: know the meaning of a record, except its `key`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mlx_ft.system.files import replacing

Record = dict[str, Any]

# Readers that use str.splitlines would cut a line at these.
_LINE_SEPARATORS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}


def json_line(record: Mapping[str, Any]) -> bytes:
    """Return a record as one line of UTF-8 JSON; any text is kept, lone surrogates as escapes."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False).translate(_LINE_SEPARATORS)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def recover(path: Path) -> list[Record]:
    """Return the records of a log and cut off the rest after the last whole one.

    Only a crash leaves such a rest: half a line, or blocks that were never written.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    records: list[Record] = []
    good_bytes = 0
    for line in content.splitlines(keepends=True):
        record = _record(line)
        if record is None:
            break
        records.append(record)
        good_bytes += len(line)
    if good_bytes < len(content):
        os.truncate(path, good_bytes)
    return records


def append(stream: BinaryIO, record: Mapping[str, Any]) -> None:
    """Write one record and wait until the disk has it."""
    stream.write(json_line(record))
    stream.flush()
    os.fsync(stream.fileno())


def rewrite(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Replace the log by these records, so that a reader sees the old or the new file whole."""
    with replacing(path) as fresh:
        fresh.write_bytes(b"".join(json_line(record) for record in records))


def _record(line: bytes) -> Record | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("key"), str) else None
