"""Run folders for the report's tests, and a planted credential that no test may ever produce."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.run_folders import TOKEN, write_run


@pytest.fixture(autouse=True)
def planted_token(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
    return TOKEN


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(ended: str = "done", said: str | None = None, name: str = "runs") -> Path:
        return write_run(tmp_path / name, ended, said)

    return make


@pytest.fixture(scope="session")
def done_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run that tests only read."""
    return write_run(tmp_path_factory.mktemp("done"))
