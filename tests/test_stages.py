"""What several stages of a run look at is read once."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mlx_ft.data import sources
from mlx_ft.recipe import DataRecipe
from mlx_ft.stages import Job


def test_the_rows_of_a_run_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[DataRecipe] = []
    monkeypatch.setattr(sources, "read_splits", lambda data: read.append(data) or {"train": ()})
    data = DataRecipe(path="somewhere")
    loaded = cast(Any, SimpleNamespace(recipe=SimpleNamespace(data=data)))
    job = Job(loaded, cast(Any, None), (), {}, Path("run"), cast(Any, None))
    assert job.rows is job.rows and read == [data]
