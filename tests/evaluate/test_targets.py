"""A target is a run, a column of one, or a model: what a folder holds decides."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_ft.errors import InputError
from mlx_ft.evaluate.targets import Target, read_targets
from mlx_ft.model.chat import ChatFormat
from mlx_ft.system.console import Console
from tests.support.models import write_tiny_model
from tests.support.run_folders import write_run


def read(text: str) -> Target:
    (target,) = read_targets([text], enable_thinking=None, default=ChatFormat(), console=Console())
    return target


@pytest.mark.parametrize("stray", ["run.json", "recipe.json", "preflight.json"])
def test_a_model_folder_with_a_file_named_as_a_runs_is_still_a_model(
    tmp_path: Path, stray: str
) -> None:
    write_tiny_model(tmp_path / "model")
    (tmp_path / "model" / stray).write_text("{}")
    assert read(str(tmp_path / "model")).name == "model"


@pytest.mark.parametrize("lost", ["run.json", "recipe.json"])
def test_a_run_without_its_record_or_recipe_is_named_as_a_run_that_cannot_be_read(
    tmp_path: Path, lost: str
) -> None:
    run = write_run(tmp_path)
    (run / lost).unlink()
    for text in (str(run), f"{run}:base"):
        with pytest.raises(InputError, match="holds no readable run"):
            read(text)
