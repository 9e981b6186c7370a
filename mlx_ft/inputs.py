"""Resolve a recipe: model, data, suites, original; one hash of inputs per stage.

Does not: read rows, ask models, or decide the order of stages (`pipeline.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mlx_ft.data.rows import FileRows
from mlx_ft.data.sources import data_inputs
from mlx_ft.data.stage import read_rows
from mlx_ft.errors import Fault, InputError, MlxFtError
from mlx_ft.evaluate.chat_fingerprint import thinking_faults
from mlx_ft.evaluate.checkpoint_prompts import chooser, evaluated
from mlx_ft.evaluate.gates import gate_faults
from mlx_ft.evaluate.suites import Suite, load_suites
from mlx_ft.job import Job
from mlx_ft.model.adapter_file import start_sha256
from mlx_ft.model.resolve import ResolvedModel, resolve_model
from mlx_ft.recipe.export import fused_copy_needed_by
from mlx_ft.recipe.load import LoadedRecipe
from mlx_ft.recipe.schema import Recipe
from mlx_ft.report.trackers.services import missing_packages
from mlx_ft.runs.folder import run_folder
from mlx_ft.system.console import Console
from mlx_ft.system.files import hash_of

# Raised when a stage would make something else of the same inputs; older folders are then redone.
STAGE_VERSIONS = {"data": 2, "train": 11, "export": 6, "eval": 3}
# Hopes for a run, who is told of it, and how often it could be continued change no bit of it. What
# bounds memory does: sums of other parts differ in their last digits.
BESIDE_THE_RUN: Mapping[str, bool | dict[str, bool]] = {
    "hypothesis": True,
    "expected": True,
    "train": {
        "report_to": True,
        "project_name": True,
        "save_every": True,
        "keep_checkpoints": True,
        "segment_steps": True,
    },
}
T = TypeVar("T")


@dataclass(frozen=True)
class OpenRun:
    """A run whose names are all found: its job, and the further inputs of its stages.

    suites: asked in the evaluation, without the prompts of `choosing`.
    choosing: the prompts that choose a checkpoint, or None.
    original: the model that the adapter is fused into, where it is not the trained one.
    """

    job: Job
    suites: tuple[Suite, ...]
    choosing: Suite | None
    original: ResolvedModel | None

    @cached_property
    def rows(self) -> Mapping[str, FileRows]:
        """Split name -> its rows, replayed ones included; read once, for three stages."""
        return read_rows(self.job)


def open_run(loaded: LoadedRecipe, runs_root: Path, console: Console) -> OpenRun:
    """Find model, data and suites of a recipe, and the run folder that they make.

    Raises one InputError with the faults of all of them.
    """
    recipe = loaded.recipe
    faults: list[Fault] = []

    def attempt(work: Callable[[], T]) -> T | None:
        try:
            return work()
        except MlxFtError as error:
            faults.extend(error.faults)
            return None

    sources = attempt(lambda: data_inputs(recipe.data))
    suites = attempt(lambda: load_suites([Path(path) for path in recipe.eval.suites]))
    model = attempt(lambda: resolve_model(recipe.model, recipe.revision, console))
    base = recipe.export.base
    original = attempt(lambda: resolve_model(base, None, console)) if base else None
    start = attempt(lambda: start_sha256(recipe.train.resume_adapter_file))
    faults += missing_packages(recipe.train.report_to)
    choosing = attempt(lambda: chooser(recipe.train.select))
    asked = [*(suites or ()), *([choosing] if choosing else [])]
    faults += thinking_faults(asked, recipe.chat.enable_thinking)
    if suites is not None:
        faults += _gate_faults(loaded, suites)
    if suites is not None and choosing is not None:
        whole, chosen = suites, choosing
        suites = attempt(lambda: evaluated(whole, recipe.eval.suites, chosen))
    if faults or model is None or sources is None or suites is None:
        raise InputError(faults)
    suites = tuple(replace(suite, samples=suite.samples[: recipe.eval.limit]) for suite in suites)
    values = recipe.model_dump(mode="json", exclude=BESIDE_THE_RUN)
    # The weights in the file are what a run starts from, whatever the file is called.
    values["train"]["resume_adapter_file"] = start
    inputs = _stage_inputs(recipe, values, sources, model, original, suites, choosing)
    # Another gate judges the same run anew; it makes no other run.
    del values["eval"]["gates"]
    identity = hash_of([values, sources, model.identity])
    run = run_folder(runs_root, recipe.name, identity)
    return OpenRun(Job(loaded, model, inputs, run, console), suites, choosing, original)


def _gate_faults(loaded: LoadedRecipe, suites: Sequence[Suite]) -> list[Fault]:
    """Return a fault for every gate on a suite that the recipe does not measure."""
    at = "eval.gates."
    places = {key.removeprefix(at): v for key, v in loaded.origins.items() if key.startswith(at)}
    return gate_faults(loaded.recipe.eval.parsed_gates(), suites, places)


def _stage_inputs(
    recipe: Recipe,
    values: Mapping[str, Any],
    sources: Mapping[str, Any],
    model: ResolvedModel,
    original: ResolvedModel | None,
    suites: Sequence[Suite],
    choosing: Suite | None,
) -> dict[str, str]:
    """Return stage -> hash; each stage's inputs contain those of the stage before."""
    versions = STAGE_VERSIONS
    data = hash_of([versions["data"], values["data"], values["chat"], sources, model.identity])
    select = None if choosing is None else choosing.file_sha256
    train = hash_of([versions["train"], data, values["train"], select])
    into = None if original is None else original.identity
    needs = fused_copy_needed_by(recipe.export, recipe.eval)
    export = hash_of([versions["export"], train, values["export"], into, needs])
    evaluation = hash_of(
        [versions["eval"], export, values["eval"], [suite.file_sha256 for suite in suites]]
    )
    return {"data": data, "train": train, "export": export, "eval": evaluation}
