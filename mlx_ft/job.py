"""One run as the stages see it: recipe, model, run folder, input hashes, console.

Does not: read rows or suites; stages are given those by the pipeline (see `inputs.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault, RunError
from mlx_ft.model.chat import ChatFormat, ChatRenderer
from mlx_ft.model.resolve import ResolvedModel
from mlx_ft.recipe.load import LoadedRecipe
from mlx_ft.recipe.schema import Recipe
from mlx_ft.runs.folder import read_manifest
from mlx_ft.system.console import Console


@dataclass(frozen=True)
class Job:
    """One run of a recipe.

    loaded: the recipe, with the origin of each value.
    model: the base model, found on disk.
    inputs: stage name -> hash of all that the stage depends on.
    folder: the run folder.
    judged: False for a rehearsal with random weights, whose answers are noise.
    """

    loaded: LoadedRecipe
    model: ResolvedModel
    inputs: Mapping[str, str]
    folder: Path
    console: Console
    judged: bool = True

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe


def renderer(job: Job) -> ChatRenderer:
    """Return the renderer of the job's base model."""
    return renderer_of(job.recipe, job.model)


def renderer_of(recipe: Recipe, model: ResolvedModel) -> ChatRenderer:
    """Return the renderer of a model in a recipe's chat format."""
    return ChatRenderer.from_folder(model.path, ChatFormat.of(recipe.chat))


def manifest_info(job: Job, stage: str) -> Mapping[str, Any]:
    manifest = read_manifest(job.folder / stage)
    if manifest is None:
        raise RunError(
            Fault(str(job.folder / stage), "incomplete", "run the recipe again to finish it")
        )
    return manifest.info
