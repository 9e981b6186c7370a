"""Which prompts are looked at after a training: validation rows and ordinary talk. No MLX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TALK_PROMPTS = ("Hello", "What is the capital of France?")
SAMPLES = 5

Messages = Sequence[Mapping[str, Any]]


def choose_prompts(validation: Sequence[tuple[str | None, Messages]]) -> list[Messages]:
    """Return five prompts from (category, prompt messages) pairs and ordinary talk.

    One of each category first, in the order they come; a row that is only an answer has no prompt.
    """
    seen: set[str | None] = set()
    first: list[Messages] = []
    rest: list[Messages] = []
    for category, messages in validation:
        if not messages:
            continue
        (rest if category in seen else first).append(messages)
        seen.add(category)
    talk: list[Messages] = [[{"role": "user", "content": text}] for text in TALK_PROMPTS]
    return [*(first + rest)[: SAMPLES - len(talk)], *talk][:SAMPLES]
