"""What the supervisor hands to the training process and gets back, as JSON files in one folder.

Does not: import MLX, train, or decide what an ending means.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_ft import errors
from mlx_ft.errors import Fault, MlxFtError
from mlx_ft.recipe.schema import Recipe
from mlx_ft.runs.folder import Manifest, complete_stage
from mlx_ft.system.files import hash_of, read_json, write_json
from mlx_ft.train.sanity_check import Prompt

JOB_FILE = "job.json"
RESULT_FILE = "result.json"
ERROR_FILE = "error.json"
HEARTBEAT_FILE = "heartbeat.json"
LOCK_FILE = "lock"
HEARTBEAT_SECONDS = 1.0


def seed_folder(seed: int) -> str:
    """Return the name of a seed's stage within the training's."""
    return f"seed-{seed}"


@dataclass(frozen=True)
class TrainStage:
    """Inputs of the stage: the recipe, where model and rows are, where results go.

    `inputs` is the hash that a checkpoint must carry to be continued, `prefix_folder` keeps what
    frozen layers give out, `look_prompts` are answered before anything is merged, and the answers
    judged if `judge_look`.

    With `seeds` each of them is trained, into a stage of its own within `folder`.
    """

    recipe: Recipe
    model_folder: Path
    data_folder: Path
    folder: Path
    inputs: str
    model_identity: str
    prefix_limit_bytes: int
    prefix_folder: Path
    look_prompts: Sequence[Prompt]
    judge_look: bool = True
    seeds: tuple[int, ...] = ()

    def of_seed(self, seed: int) -> TrainStage:
        """Return the stage that trains one of the seeds, as if it were alone."""
        train = self.recipe.train.model_copy(update={"seed": seed, "seeds": []})
        return replace(
            self,
            recipe=self.recipe.model_copy(update={"train": train}),
            folder=self.folder / f"{seed_folder(seed)}.tmp",
            inputs=hash_of([self.inputs, seed]),
            seeds=(),
        )

    def trained(self, seed: int) -> Manifest | None:
        """Return what one of the seeds came to, None while it is not complete."""
        return complete_stage(self.folder, seed_folder(seed), self.of_seed(seed).inputs)


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life: how many there were, what was being done, and the longest time between two
    of them, in seconds.
    """

    beats: int
    doing: str
    longest_seconds: float


def write_stage(control: Path, stage: TrainStage) -> None:
    """Write the job for the training process, and remove what an earlier one answered."""
    forget_answers(control)
    paths = ("model_folder", "data_folder", "folder", "prefix_folder")
    values = {**vars(stage), "recipe": stage.recipe.model_dump(mode="json")}
    values |= {name: str(getattr(stage, name).resolve()) for name in paths}
    values["look_prompts"] = [vars(prompt) for prompt in stage.look_prompts]
    write_json(control / JOB_FILE, values)


def forget_answers(control: Path) -> None:
    """Remove what an earlier training process answered."""
    for name in (RESULT_FILE, ERROR_FILE, HEARTBEAT_FILE):
        (control / name).unlink(missing_ok=True)


def read_stage(control: Path) -> TrainStage:
    """Return the job that `write_stage` wrote."""
    values = read_json(control / JOB_FILE)
    values["recipe"] = Recipe.model_validate(values["recipe"], context={"conflicts": []})
    for name in ("model_folder", "data_folder", "folder", "prefix_folder"):
        values[name] = Path(values[name])
    values["look_prompts"] = [Prompt(**prompt) for prompt in values["look_prompts"]]
    values["seeds"] = tuple(values["seeds"])
    return TrainStage(**values)


def write_error(control: Path, error: MlxFtError) -> None:
    """Leave an error that a user can act on for the supervisor to raise."""
    faults = [vars(fault) for fault in error.faults]
    write_json(control / ERROR_FILE, {"kind": type(error).__name__, "faults": faults})


def read_error(control: Path) -> MlxFtError | None:
    """Return the error that the training process left, if it did."""
    try:
        value = read_json(control / ERROR_FILE)
    except (OSError, ValueError):
        return None
    kind = getattr(errors, value["kind"])
    assert issubclass(kind, MlxFtError)
    error: MlxFtError = kind([Fault(**fault) for fault in value["faults"]])
    return error


class Pulse:
    """Writes heartbeats, one a second at most."""

    def __init__(self, control: Path) -> None:
        self._file = control / HEARTBEAT_FILE
        self._beats = 0
        self._longest = 0.0
        self._last = time.monotonic()
        self._written = float("-inf")

    def beat(self, doing: str) -> None:
        """Say that the process lives, and what it does."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        self._beats += 1
        if now - self._written < HEARTBEAT_SECONDS:
            return
        self._written = now
        fresh = self._file.with_name(f"{self._file.name}.{os.getpid()}.tmp")
        value = {"beats": self._beats, "doing": doing, "longest_seconds": self._longest}
        fresh.write_text(json.dumps(value), encoding="utf-8")  # not flushed: it may be lost
        fresh.replace(self._file)


def read_heartbeat(control: Path) -> Heartbeat | None:
    """Return the last heartbeat, if there is one."""
    try:
        return Heartbeat(**read_json(control / HEARTBEAT_FILE))
    except (OSError, ValueError, TypeError):
        return None
