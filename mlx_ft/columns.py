"""The models that are asked, as columns of a table: from a folder or a name to one that answers.

Does: say what a target of `mlx-ft eval` stands for (a run and its column, a folder, a Hub id, a
built-in name), open a model for as long as it is asked. Does not: ask, score, or import MLX before
a model is opened. Servers are in `evaluate/endpoint.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_ft.errors import Fault, InputError
from mlx_ft.evaluate.asking import Answer, Column, OnAnswer, Question
from mlx_ft.model.chat import ChatRenderer
from mlx_ft.model.resolve import identity_of, resolve_model
from mlx_ft.model.thinking_mode import thinking_mode_of
from mlx_ft.recipe.schema import COLUMNS
from mlx_ft.runs.models import RunModels, column_folders, read_run
from mlx_ft.system.files import hash_of

if TYPE_CHECKING:  # importing it would load MLX
    from mlx_ft.engine.generate import Generation
    from mlx_ft.engine.load import LoadedModel

DEFAULT_COLUMN = "quantized"
# As mlx_lm.batch_generate has it; on a CPU, a prompt then costs two thirds of what it does with 16.
DEFAULT_BATCH_SIZE = 32


@dataclass(frozen=True)
class ModelPlace:
    """A model on this disk: its folder, an adapter's (or None), and how it is talked to."""

    folder: Path
    adapter: Path | None
    enable_thinking: bool
    date: str


@dataclass(frozen=True)
class LocalModel:
    """A model in memory as a respondent."""

    loaded: LoadedModel
    batch_size: int

    def answer(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        """Answer questions that this model's renderer has rendered."""
        from mlx_ft.engine.generate import generate

        losses = self._reference_losses(questions)
        renderer = self.loaded.renderer

        def on_done(index: int, said: Generation) -> None:
            raw = renderer.decode_raw(said.ids)
            ended, count, loss = said.finish_reason, len(said.ids), losses.get(index)
            on_answer(index, Answer(said.text, raw, said.ids, ended, count, loss))

        generate(
            self.loaded,
            [_ids(question) for question in questions],
            max_tokens=[question.max_tokens for question in questions],
            batch_size=self.batch_size,
            on_done=on_done,
        )

    def _reference_losses(self, questions: Sequence[Question]) -> dict[int, float]:
        """Return the loss of each reference, by the number of its question."""
        from mlx_ft.engine.likelihood import likelihoods

        wanted = [(i, each) for i, each in enumerate(questions) if each.reference is not None]
        found = likelihoods(
            self.loaded,
            [_ids(question) for _, question in wanted],
            [question.reference or () for _, question in wanted],
            batch_size=self.batch_size,
        )
        return {index: each.loss for (index, _), each in zip(wanted, found, strict=True)}


def _ids(question: Question) -> tuple[int, ...]:
    assert question.ids is not None, "a model in memory is asked what its renderer has rendered"
    return question.ids


@contextmanager
def open_loaded(place: ModelPlace) -> Iterator[LoadedModel]:
    """Load a model for a while."""
    from mlx_ft.engine.load import load_model, release

    loaded = load_model(
        place.folder,
        adapter=place.adapter,
        enable_thinking=place.enable_thinking,
        date=place.date,
    )
    try:
        yield loaded
    finally:
        del loaded
        release()


@contextmanager
def open_local(place: ModelPlace, batch_size: int) -> Iterator[LocalModel]:
    """Load a model for as long as it is asked."""
    with open_loaded(place) as loaded:
        local = LocalModel(loaded, batch_size)
        del loaded
        yield local
        del local


def local_column(
    name: str,
    place: ModelPlace,
    sha256: str,
    *,
    batch_size: int,
    trained_with: Mapping[str, Any] | None = None,
    reusable: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Column:
    """Return the column of a model on this disk. Raises ModelError when it has no usable chat
    template.
    """
    renderer = ChatRenderer.from_folder(
        place.folder, enable_thinking=place.enable_thinking, date=place.date
    )
    opened: Callable[[], AbstractContextManager[LocalModel]] = partial(
        open_local, place, batch_size
    )
    return Column(
        name=name,
        sha256=sha256,
        renderer=renderer,
        open=opened,
        trained_with=trained_with,
        enable_thinking=place.enable_thinking,
        reusable=reusable,
        facts=facts,
    )


def loaded_column(
    name: str, loaded: LoadedModel, sha256: str, *, batch_size: int, reusable: bool = False
) -> Column:
    """Return the column of a model that is in memory already, and stays there."""
    local = LocalModel(loaded, batch_size)
    return Column(
        name=name,
        sha256=sha256,
        renderer=loaded.renderer,
        open=lambda: nullcontext(local),
        enable_thinking=loaded.renderer.enable_thinking,
        reusable=reusable,
    )


@dataclass(frozen=True)
class Target:
    """What a target stands for: the name of its column, the model, and the hash of its weights.

    `trained_with` is the chat fingerprint of the run that it comes from, if it comes from one.
    """

    name: str
    place: ModelPlace
    sha256: str
    trained_with: Mapping[str, Any] | None
    reusable: bool
    facts: Mapping[str, Any]

    def column(self, batch_size: int) -> Column:
        """Return it as a column to be asked."""
        return local_column(
            self.name,
            self.place,
            self.sha256,
            batch_size=batch_size,
            trained_with=self.trained_with,
            reusable=self.reusable,
            facts=self.facts,
        )


def is_run(folder: Path) -> bool:
    """Return whether a folder is one that a recipe has run in."""
    return (folder / "run.json").is_file()


def read_targets(
    texts: Sequence[str],
    *,
    enable_thinking: bool | None,
    default_thinking: bool,
    date: str,
    say: Callable[[str], None],
) -> list[Target]:
    """Return what the targets of a command line stand for.

    `enable_thinking` None is what a run was trained with or a model folder names, and
    `default_thinking` for other models.
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
                target = _model_target(text, enable_thinking, default_thinking, date, say)
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
    head, _, column = text.rpartition(":")
    if head and column in COLUMNS and is_run(Path(head)):
        return read_run(Path(head)), column
    return (read_run(Path(text)), DEFAULT_COLUMN) if is_run(Path(text)) else None


def _model_target(
    text: str,
    enable_thinking: bool | None,
    default_thinking: bool,
    date: str,
    say: Callable[[str], None],
) -> Target:
    model = resolve_model(text, None, say)
    named = thinking_mode_of(model.path) if enable_thinking is None else enable_thinking
    thinking = default_thinking if named is None else named
    name = Path(text).resolve().name if model.source == "local" else text.replace("/", "--")
    return Target(
        name=name,
        place=ModelPlace(model.path, None, thinking, date),
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
        place=ModelPlace(folder, adapter, thinking, made.date),
        sha256=sha256,
        trained_with=made.manifest("data").info.get("fingerprint"),
        reusable=column == "base",
        facts={"run": made.name, "column": column, "model": model["name"]},
    )
