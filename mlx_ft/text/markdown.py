"""Markdown tables and cells that untrusted text cannot break. Paths are cut to their last name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from mlx_ft.text.safe import one_line


def public_path(text: str) -> str:
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(text)
        if path.is_absolute() or text.startswith("~") or ".." in path.parts:
            return path.name or "."
    return text


def cell(value: Any) -> str:
    """Return text that stays within one cell of a table, whatever its characters."""
    text = one_line(str(value)).replace("\\", "\\\\")
    for mark in "|`*_[]":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("&", "&amp;").replace("<", "&lt;")


def table_lines(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell(each) for each in row)} |"
