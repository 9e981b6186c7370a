"""A real renderer for the data room's tests, made offline."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlx_ft.model.chat import ChatFormat, ChatRenderer
from tests.support.tokenizers import write_tiny_tokenizer

WriteFile = Callable[..., Path]


@pytest.fixture(scope="session")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> ChatRenderer:
    folder = write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return ChatRenderer.from_folder(folder, ChatFormat())


@pytest.fixture
def write_file(tmp_path: Path) -> WriteFile:
    """Write rows (JSON values) or raw lines (bytes) into `tmp_path/name`."""

    def write(rows: Sequence[Any], name: str = "train.jsonl") -> Path:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write
