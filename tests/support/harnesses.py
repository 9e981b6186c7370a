"""Suites of one column that a script answers, and columns that misbehave on request."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.models import llama

from mlx_ft.engine.load import LoadedModel
from mlx_ft.evaluate.column import Answer, Column, OnDone, Question, Respondent
from mlx_ft.evaluate.harness import (
    evaluate,
)
from mlx_ft.evaluate.local_model import LocalModel
from mlx_ft.evaluate.scorers.text import Talk
from mlx_ft.evaluate.suites import Sample, Suite
from mlx_ft.model.chat import ChatFormat, ChatRenderer
from tests.support.narration import SeenProgress

MODEL = "0" * 64
QUESTIONS = ("hello", "what is the capital of France?", "how are you", "talk", "files and tests")
Answers = Callable[[str], str]


def make_suite(name: str = "chat", **changes: Any) -> Suite:
    samples = tuple(
        Sample(
            id=f"q{number}",
            category="even" if number % 2 == 0 else "odd",
            messages=({"role": "user", "content": question},),
            tools=None,
            target={"any_of": ["fine"]},
            weight=1.0,
        )
        for number, question in enumerate(QUESTIONS)
    )
    suite = Suite(
        name=name,
        description="",
        samples=samples,
        scorer=Talk(),
        scorer_config={"name": "talk"},
        max_tokens=8,
        enable_thinking=False,
        stop=("<think>",),
        tags=(),
        file_sha256="",
    )
    return replace(suite, **changes)


def renderer_of(folder: Path, *, enable_thinking: bool = False) -> ChatRenderer:
    return ChatRenderer.from_folder(folder, ChatFormat(enable_thinking))


class Scripted:
    """Answers by a rule instead of a model, last question first; stops after `limit` answers."""

    def __init__(self, answer: Answers, limit: int | None = None) -> None:
        self.say = answer
        self.limit = limit
        self.prompts: list[str] = []
        self.renderer: ChatRenderer | None = None

    def answer(self, questions: Sequence[Question], on_done: OnDone) -> None:
        renderer = self.renderer
        assert renderer is not None
        for index in reversed(range(len(questions))):
            if self.limit is not None and len(self.prompts) >= self.limit:
                raise KeyboardInterrupt
            prompt = renderer.decode_raw(questions[index].ids or ())
            self.prompts.append(prompt)
            ids = tuple(renderer.tokenizer.encode(self.say(prompt), add_special_tokens=False))
            said, raw = renderer.decode(ids), renderer.decode_raw(ids)
            on_done(index, Answer(said, raw, ids, "stop", len(ids)))


def column_of(
    loaded: LoadedModel, asked: Any, *, name: str = "base", sha256: str = MODEL, **changes: Any
) -> Column:
    """Return a column that a script answers, or the model itself where `asked` is "model"."""
    respondent = LocalModel(loaded, batch_size=2) if asked == "model" else asked
    if asked != "model":
        asked.renderer = loaded.renderer

    @contextlib.contextmanager
    def opened() -> Iterator[Respondent]:
        yield respondent

    thinking = loaded.renderer.chat.enable_thinking
    return Column(name, sha256, loaded.renderer, opened, enable_thinking=thinking, **changes)


def fine(prompt: str) -> str:
    return "I am fine." if "how are you" in prompt else "hello <b>\u2028\x1b[31m ü"


class Columns:
    """Makes columns, and notes which were opened and whether each model was let go of."""

    def __init__(self, renderer: ChatRenderer) -> None:
        self.renderer = renderer
        self.opened: list[str] = []

    def columns(self, asked: Scripted, **changes: Any) -> list[Column]:
        asked.renderer = self.renderer
        return [
            Column(
                name,
                name[0] * 64,
                self.renderer,
                partial(self.open, name, asked),
                enable_thinking=self.renderer.chat.enable_thinking,
                **changes,
            )
            for name in ("base", "quantized")
        ]

    @contextlib.contextmanager
    def open(self, column: str, asked: Scripted) -> Iterator[Respondent]:
        self.opened.append(column)
        model = llama.Model(
            llama.ModelArgs("llama", 16, 1, 16, 2, 1e-5, len(self.renderer.tokenizer))
        )
        reference = weakref.ref(model)
        respondent = Holding(model, asked)
        del model
        yield respondent
        del respondent
        assert reference() is None, "the harness holds a model that is to make room for the next"


@dataclass
class Holding:
    """A script that has a model in memory."""

    model: nn.Module
    script: Scripted

    def answer(self, questions: Sequence[Question], on_done: OnDone) -> None:
        self.script.answer(questions, on_done)


def evaluate_all(
    suites: Sequence[Suite], columns: Columns, folder: Path, asked: Scripted, **changes: Any
) -> dict[str, Any]:
    trained = changes.pop("fingerprint", columns.renderer.fingerprint())
    made = columns.columns(
        asked, trained_with=trained, reusable=bool(changes.pop("reusable", False))
    )
    return evaluate(suites, made, folder, progress=SeenProgress(), **changes)
