"""Read command-line targets: a run and its column, a model folder, a Hub id, a built-in name.

Does not: ask, score, or import MLX. Servers are in `endpoint.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault, InputError, RunError
from mlx_ft.evaluate.column import Column
from mlx_ft.evaluate.local_model import ModelSource, local_column
from mlx_ft.model.chat import ChatFormat
from mlx_ft.model.resolve import identity_of, resolve_model
from mlx_ft.model.thinking_mode import thinking_mode_of
from mlx_ft.recipe.names import COLUMNS, DEFAULT_COLUMN
from mlx_ft.runs.folder import is_run
from mlx_ft.runs.models import RunModels, column_folders, read_run
from mlx_ft.system.console import Console
from mlx_ft.system.files import hash_of


@dataclass(frozen=True)
class Target:
    """The model behind a target.

    name: of its column.
    sha256: the hash of its weights.
    trained_with: the chat fingerprint of its run, if it comes from one.
    """

    name: str
    source: ModelSource
    sha256: str
    trained_with: Mapping[str, Any] | None
    reusable: bool
    facts: Mapping[str, Any]

    def column(self, batch_size: int) -> Column:
        """Return it as a column to be asked."""
        return local_column(
            self.name,
            self.source,
            self.sha256,
            batch_size=batch_size,
            trained_with=self.trained_with,
            reusable=self.reusable,
            facts=self.facts,
        )


def read_targets(
    texts: Sequence[str],
    *,
    enable_thinking: bool | None,
    default: ChatFormat,
    console: Console,
) -> list[Target]:
    """Return the models behind the targets of a command line.

    enable_thinking: the mode to ask in; None means the one that a run was trained with, or that a
        model folder names.
    default: the chat format of models without a run; its mode is for those that name none.

    Raises InputError with the faults of all targets.
    """
    targets: list[Target] = []
    faults: list[Fault] = []
    for text in texts:
        try:
            made = _run_and_column(text)
            if made is not None:
                target = run_target(*made, enable_thinking)
            else:
                target = _model_target(text, enable_thinking, default, console)
        except InputError as error:
            faults += error.faults
            continue
        if any(target.name == other.name for other in targets):
            faults.append(Fault(text, f"a second column called {target.name}", "name it once"))
        targets.append(target)
    if faults:
        raise InputError(faults)
    return targets


def _run_and_column(text: str) -> tuple[RunModels, str] | None:
    """Return what `RUN` or `RUN:COLUMN` names, or None for anything else."""
    folder, column = Path(text), str(DEFAULT_COLUMN)
    head, _, last = text.rpartition(":")
    if head and last in COLUMNS and is_run(Path(head)):
        folder, column = Path(head), last
    if not is_run(folder):
        return None
    try:
        return read_run(folder), column
    except RunError:
        if (Path(text) / "config.json").is_file():  # a model folder with a file named as a run's
            return None
        raise


def _model_target(
    text: str, enable_thinking: bool | None, default: ChatFormat, console: Console
) -> Target:
    model = resolve_model(text, None, console)
    named = thinking_mode_of(model.path) if enable_thinking is None else enable_thinking
    chat = default if named is None else replace(default, enable_thinking=named)
    name = Path(text).resolve().name if model.source == "local" else text.replace("/", "--")
    return Target(
        name=name,
        source=ModelSource(model.path, None, chat),
        sha256=model.identity,
        trained_with=None,
        reusable=True,
        facts={"model": model.name, "source": model.source, "revision": model.revision},
    )


def run_target(made: RunModels, column: str, enable_thinking: bool | None = None) -> Target:
    """Return one model of a run; RunError when it is not there."""
    folder, adapter = column_folders(made, column)
    model = made.record["model"]
    if column == "base":  # the same in all runs that began with it
        sha256 = identity_of(model["source"], model["name"], model["revision"])
    else:
        stage = "train" if column == "adapter" else "export"
        sha256 = hash_of([column, made.manifest(stage).inputs])
    thinking = made.enable_thinking if enable_thinking is None else enable_thinking
    return Target(
        name=f"{made.name}--{column}",
        source=ModelSource(folder, adapter, ChatFormat(thinking, made.date)),
        sha256=sha256,
        trained_with=made.manifest("data").info.get("fingerprint"),
        reusable=column == "base",
        facts={"run": made.name, "column": column, "model": model["name"]},
    )
