"""A local model as a column, loaded only while it is asked.

Does not: ask, score, or import MLX before a model is opened. Servers are in `endpoint.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_ft.evaluate.column import Answer, Column, OnDone, Question
from mlx_ft.model.chat import ChatFormat, ChatRenderer

if TYPE_CHECKING:
    from mlx_ft.engine.generate import Generation
    from mlx_ft.engine.load import LoadedModel


@dataclass(frozen=True)
class ModelSource:
    """A model on this disk, and how it is talked to.

    folder: the model folder.
    adapter: the folder of an adapter that is put on it, or None.
    chat: the format of its conversations.
    """

    folder: Path
    adapter: Path | None
    chat: ChatFormat


@dataclass(frozen=True)
class LocalModel:
    """A model in memory as a respondent."""

    loaded: LoadedModel
    batch_size: int

    def answer(self, questions: Sequence[Question], on_done: OnDone) -> None:
        """Answer questions that this model's renderer has rendered."""
        from mlx_ft.engine.generate import generate

        losses = self._reference_losses(questions)
        renderer = self.loaded.renderer

        def generated(index: int, said: Generation) -> None:
            raw = renderer.decode_raw(said.ids)
            ended, count, loss = said.finish_reason, len(said.ids), losses.get(index)
            on_done(index, Answer(said.text, raw, said.ids, ended, count, loss))

        generate(
            self.loaded,
            [_ids(question) for question in questions],
            max_tokens=[question.max_tokens for question in questions],
            batch_size=self.batch_size,
            on_done=generated,
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
def open_loaded(source: ModelSource) -> Iterator[LoadedModel]:
    """Load a model for a while."""
    from mlx_ft.engine.load import load_model, release

    loaded = load_model(source.folder, source.chat, adapter=source.adapter)
    try:
        yield loaded
    finally:
        del loaded
        release()


@contextmanager
def open_local(source: ModelSource, batch_size: int) -> Iterator[LocalModel]:
    """Load a model for as long as it is asked."""
    with open_loaded(source) as loaded:
        local = LocalModel(loaded, batch_size)
        del loaded
        yield local
        del local


def local_column(
    name: str,
    source: ModelSource,
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
    renderer = ChatRenderer.from_folder(source.folder, source.chat)
    opened: Callable[[], AbstractContextManager[LocalModel]] = partial(
        open_local, source, batch_size
    )
    return Column(
        name=name,
        sha256=sha256,
        renderer=renderer,
        open=opened,
        trained_with=trained_with,
        enable_thinking=source.chat.enable_thinking,
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
        enable_thinking=loaded.renderer.chat.enable_thinking,
        reusable=reusable,
    )
