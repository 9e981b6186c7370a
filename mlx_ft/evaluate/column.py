"""Types used by the evaluation harness: Question, Answer, Respondent, Column.

Does not: ask, or know of files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_ft.model.chat import ChatRenderer

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A chat to be answered.

    messages: the conversation so far.
    tools: the tools on offer, or None.
    ids: the prompt as the column's renderer made it; None where a server renders.
    max_tokens: the longest answer.
    stop: texts that end an answer.
    reference: ids of a right answer, where its loss is wanted too.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None
    ids: tuple[int, ...] | None
    max_tokens: int
    stop: tuple[str, ...] = ()
    reference: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        given: object = self.messages  # whatever the annotation says
        if isinstance(given, str | bytes):
            raise TypeError("a chat model is prompted with messages, never with a bare string")


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    text: without control tokens.
    raw: with control tokens.
    ids: its tokens without the stop token, where they are known.
    finish_reason: why it ended.
    reference_loss: the mean loss of the question's reference (nats a token).
    """

    text: str
    raw: str
    ids: tuple[int, ...] | None
    finish_reason: str
    generated_tokens: int
    reference_loss: float | None = None


# Called as each answer ends, with the number of its question.
OnDone = Callable[[int, Answer], None]


class Respondent(Protocol):
    """Answers questions, greedily: a model in memory, or one behind a server."""

    def answer(self, questions: Sequence[Question], on_done: OnDone) -> None:
        """Answer all questions, in any order."""


@dataclass(frozen=True)
class Column:
    """One model to be asked.

    name: its name in the results.
    sha256: stands for its weights in the keys of records.
    renderer: that of its own folder, or None for a server.
    open: makes it ready to answer, for a while.
    trained_with: the chat fingerprint of its training, where it is known.
    reusable: answers may be kept for later evaluations of other folders.
    facts: for readers of the results (plain JSON).
    """

    name: str
    sha256: str
    renderer: ChatRenderer | None
    open: Callable[[], AbstractContextManager[Respondent]]
    trained_with: Mapping[str, Any] | None = None
    enable_thinking: bool = False
    reusable: bool = False
    facts: Mapping[str, Any] | None = None
