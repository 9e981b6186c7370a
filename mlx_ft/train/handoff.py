"""Request and reply files between the supervisor and the training process, in one folder.

Does not: import MLX, train, or interpret the end of a process.
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
class TrainRequest:
    """Request of the parent process: train this recipe, on these files, into this folder.

    recipe: the whole recipe.
    model_folder, data_folder: where the model and the tokenized rows are.
    folder: stage folder for the results.
    inputs: hash that a checkpoint must carry to be continued.
    model_identity: name and revision of the model, for the key of cached outputs.
    prefix_limit_bytes: memory for outputs of the frozen layers (bytes).
    prefix_folder: folder where those outputs are kept between runs.
    sanity_prompts: prompts that the model answers before anything is merged.
    sanity_required: degenerate answers stop the run.
    seeds: seeds to train, each into a stage of its own within `folder`; empty: the recipe's seed.
    """

    recipe: Recipe
    model_folder: Path
    data_folder: Path
    folder: Path
    inputs: str
    model_identity: str
    prefix_limit_bytes: int
    prefix_folder: Path
    sanity_prompts: Sequence[Prompt]
    sanity_required: bool = True
    seeds: tuple[int, ...] = ()

    def of_seed(self, seed: int) -> TrainRequest:
        """Return the request that trains one of the seeds, as if it were alone."""
        train = self.recipe.train.model_copy(update={"seed": seed, "seeds": []})
        return replace(
            self,
            recipe=self.recipe.model_copy(update={"train": train}),
            folder=self.folder / f"{seed_folder(seed)}.tmp",
            inputs=hash_of([self.inputs, seed]),
            seeds=(),
        )

    def trained(self, seed: int) -> Manifest | None:
        """Return the manifest of a seed's training, None while it is not complete."""
        return complete_stage(self.folder, seed_folder(seed), self.of_seed(seed).inputs)


@dataclass(frozen=True)
class Heartbeat:
    """Sign of life of the training process.

    beats: number of signs so far.
    doing: the work at the last one.
    longest_seconds: longest time between two of them (seconds).
    """

    beats: int
    doing: str
    longest_seconds: float


# Fields of a request whose keys in job.json have other names.
FILE_KEYS = {"sanity_prompts": "look_prompts", "sanity_required": "judge_look"}
PATHS = ("model_folder", "data_folder", "folder", "prefix_folder")


def write_request(control: Path, request: TrainRequest) -> None:
    """Write job.json for the training process, and remove the answers to an earlier request."""
    forget_answers(control)
    values = {**vars(request), "recipe": request.recipe.model_dump(mode="json")}
    values |= {name: str(getattr(request, name).resolve()) for name in PATHS}
    values["sanity_prompts"] = [vars(prompt) for prompt in request.sanity_prompts]
    write_json(
        control / JOB_FILE, {FILE_KEYS.get(name, name): value for name, value in values.items()}
    )


def forget_answers(control: Path) -> None:
    """Remove the answers of an earlier training process."""
    for name in (RESULT_FILE, ERROR_FILE, HEARTBEAT_FILE):
        (control / name).unlink(missing_ok=True)


def read_request(control: Path) -> TrainRequest:
    """Return the request that `write_request` wrote."""
    names = {key: name for name, key in FILE_KEYS.items()}
    values = {names.get(key, key): v for key, v in read_json(control / JOB_FILE).items()}
    values["recipe"] = Recipe.model_validate(values["recipe"], context={"conflicts": []})
    for name in PATHS:
        values[name] = Path(values[name])
    values["sanity_prompts"] = [Prompt(**prompt) for prompt in values["sanity_prompts"]]
    values["seeds"] = tuple(values["seeds"])
    return TrainRequest(**values)


def write_error(control: Path, error: MlxFtError) -> None:
    """Write an error that a user can act on, for the supervisor to raise."""
    faults = [vars(fault) for fault in error.faults]
    write_json(control / ERROR_FILE, {"kind": type(error).__name__, "faults": faults})


def read_error(control: Path) -> MlxFtError | None:
    """Return the error that the training process wrote, None when it wrote none."""
    try:
        value = read_json(control / ERROR_FILE)
    except (OSError, ValueError):
        return None
    kind = getattr(errors, value["kind"])
    assert issubclass(kind, MlxFtError)
    error: MlxFtError = kind([Fault(**fault) for fault in value["faults"]])
    return error


class Pulse:
    """Writes heartbeats, at most one a second."""

    def __init__(self, control: Path) -> None:
        self._file = control / HEARTBEAT_FILE
        self._beats = 0
        self._longest = 0.0
        self._last = time.monotonic()
        self._written = float("-inf")

    def beat(self, doing: str) -> None:
        """Record that the process is alive, and its present work."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        self._beats += 1
        if now - self._written < HEARTBEAT_SECONDS:
            return
        self._written = now
        # A signal handler may beat while another beat is written: each has a file of its own.
        fresh = self._file.with_name(f"{self._file.name}.{os.getpid()}.{self._beats}.tmp")
        value = {"beats": self._beats, "doing": doing, "longest_seconds": self._longest}
        fresh.write_text(json.dumps(value), encoding="utf-8")  # not flushed: it may be lost
        fresh.replace(self._file)


def read_heartbeat(control: Path) -> Heartbeat | None:
    """Return the last heartbeat, None when there is none."""
    try:
        return Heartbeat(**read_json(control / HEARTBEAT_FILE))
    except (OSError, ValueError, TypeError):
        return None
