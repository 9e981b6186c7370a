"""Read JSONL, JSON, CSV and Parquet files as JSON values, each with its place in the file.

Does not: know what a row means, or fetch anything.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mlx_ft.data.messages import Complaint, refuse_constant
from mlx_ft.data.problems import shown

MAX_LINE_BYTES = 16 * 1024 * 1024
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# (place from 1, what is wrong, the value where nothing is)
Item = tuple[int, Complaint | None, Any]
LIST_FIX = "write a list of rows, or name it .jsonl"
PARQUET_FIX = "install it with: pip install 'mlx-ft[parquet]'"


def json_lines(path: Path) -> Iterator[Item]:
    """Yield the value of every line that is not blank, with its number."""
    with path.open("rb") as stream:
        for line, raw in _lines(stream):
            yield (line, *_json_value(raw, line))


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number, line) of all lines that are not blank; None for one that is far too long."""
    line = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        line += 1
        if len(raw) > MAX_LINE_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(MAX_LINE_BYTES)
            yield line, None
        elif raw.strip():
            yield line, raw


def _json_value(raw: bytes | None, line: int = 1) -> tuple[Complaint | None, Any]:
    """Return (complaint, None) or (None, the value)."""
    fix = "fix or remove the line"
    if raw is None:
        found = f"longer than {MAX_LINE_BYTES // 2**20} MiB"
        return Complaint("line too long", found, fix), None
    if line == 1 and raw.startswith(BYTE_ORDER_MARK):
        found = "starts with a byte order mark"
        return Complaint("byte order mark", found, "save the file as UTF-8 without BOM"), None
    try:
        return None, json.loads(raw.decode("utf-8"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        found = f"not UTF-8 (byte {raw[error.start]:#04x} at column {error.start + 1})"
        return Complaint("not UTF-8", found, "save the file as UTF-8"), None
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        return Complaint("not valid JSON", f"not valid JSON ({error.msg}, {at})", fix), None
    except ValueError as error:  # NaN, or a number of thousands of digits
        return Complaint("not valid JSON", f"not valid JSON ({error})", fix), None
    except RecursionError:
        return Complaint("not valid JSON", "not valid JSON (nested too deeply)", fix), None


def json_list(path: Path) -> Iterator[Item]:
    """Yield the items of a file that is one JSON list, numbered from 1."""
    raw = path.read_bytes()
    complaint, value = _json_value(raw)
    if complaint is None and not isinstance(value, list):
        complaint = Complaint("not a list", f"not a JSON list but {shown(value)}", LIST_FIX)
    elif complaint is not None and isinstance(_json_value(raw.lstrip().split(b"\n")[0])[1], dict):
        complaint = Complaint("not a list", "not a JSON list but JSON lines", LIST_FIX)
    if complaint is not None:
        yield 1, complaint, None
        return
    for number, item in enumerate(value, start=1):
        yield number, None, item


def csv_rows(path: Path) -> Iterator[Item]:
    """Yield each record of a CSV file as an object of texts, with the line it ends in.

    The first record names the columns. A cell that is empty is left out of its row.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"not UTF-8 (byte {error.start + 1} of the file)"
        yield 1, Complaint("not UTF-8", found, "save the file as UTF-8"), None
        return
    csv.field_size_limit(MAX_LINE_BYTES)  # of 131,072 characters, which a long answer may pass
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            found = f"not valid CSV ({error})"
            yield reader.line_num, Complaint("not valid CSV", found, "check its quotes"), None
            return
        if not record:
            continue
        if header is None:
            header = record
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                found = f"the column {shown(twice[0])} is there twice"
                yield reader.line_num, Complaint("column twice", found, "rename one"), None
                return
            continue
        if len(record) != len(header):
            found = f"{len(record)} cells where the header has {len(header)}"
            fix = "quote cells that hold commas or line breaks"
            yield reader.line_num, Complaint("other number of cells", found, fix), None
            continue
        cells = zip(header, record, strict=True)
        yield reader.line_num, None, {name: cell for name, cell in cells if cell}


def parquet_rows(path: Path) -> Iterator[Item]:
    """Yield the rows of a Parquet file, numbered from 1; null values are left out."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        yield 1, Complaint("no reader", "Parquet needs the package pyarrow", PARQUET_FIX), None
        return
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield number, None, without_nulls(value)
    except (ArrowException, ValueError) as error:
        (said, *_) = str(error).splitlines() or [type(error).__name__]
        found = f"not valid Parquet ({said})"
        yield number + 1, Complaint("not valid Parquet", found, "write the file again"), None


def without_nulls(value: Any) -> Any:
    """Return a value without the null fields that a table's common schema brings along."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


READERS: Mapping[str, Callable[[Path], Iterator[Item]]] = {
    ".jsonl": json_lines,
    ".json": json_list,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}


def read_items(path: Path) -> Iterator[Item]:
    """Yield the rows of a file as (place from 1, complaint or None, value).

    The file's ending decides how it is read; JSON lines for any other. OSError when it cannot be
    read.
    """
    return READERS.get(path.suffix.lower(), json_lines)(path)
