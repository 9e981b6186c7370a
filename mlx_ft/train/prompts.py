"""Which prompts are looked at after a training: validation rows and ordinary talk. No MLX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TALK_PROMPTS = ("Hello", "What is the capital of France?")
SAMPLES = 5


@dataclass(frozen=True)
class Prompt:
    """What the assistant is to answer: a conversation so far, and the tools it is offered."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None


def choose_prompts(validation: Sequence[tuple[str | None, Prompt]]) -> list[Prompt]:
    """Return five prompts from (category, prompt) pairs and ordinary talk.

    One of each category first, in the order they come; a row that is only an answer has no prompt.
    """
    seen: set[str | None] = set()
    first: list[Prompt] = []
    rest: list[Prompt] = []
    for category, prompt in validation:
        if not prompt.messages:
            continue
        (rest if category in seen else first).append(prompt)
        seen.add(category)
    talk = [Prompt([{"role": "user", "content": text}]) for text in TALK_PROMPTS]
    return [*(first + rest)[: SAMPLES - len(talk)], *talk][:SAMPLES]
