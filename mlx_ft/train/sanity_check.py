"""Sanity check: five generations right after training, before anything is merged.

Two or more degenerate answers stop the run. A single one is only shown: small base models loop now
and then by themselves. MLX-free at import, because the parent process needs `Prompt`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_ft.errors import Fault, GateFailed
from mlx_ft.system.console import Console
from mlx_ft.text.repetition import degenerate_reason

if TYPE_CHECKING:  # MLX-free for the parent process
    from mlx_ft.engine.load import LoadedModel

MAX_TOKENS = 64
TOO_MANY_DEGENERATE = 2


@dataclass(frozen=True)
class SanitySample:
    """One prompt with its answer: a line of samples.jsonl.

    messages: the prompt.
    text: the answer.
    finish_reason: why the answer ended.
    generated_tokens: its length (tokens).
    degenerate: why it is degenerate (None: it is not).
    """

    messages: list[dict[str, Any]]
    text: str
    finish_reason: str
    generated_tokens: int
    degenerate: str | None


def sanity_samples(
    loaded: LoadedModel, prompts: Sequence[Prompt], file: Path, console: Console
) -> tuple[SanitySample, ...]:
    """Generate the samples, write them (JSONL) and show them."""
    from mlx_ft.engine.generate import generate

    ids = [loaded.renderer.prompt_ids(prompt.messages, prompt.tools) for prompt in prompts]
    answers = generate(loaded, ids, max_tokens=MAX_TOKENS)
    samples = tuple(
        SanitySample(
            [dict(message) for message in prompt.messages],
            answer.text,
            answer.finish_reason,
            len(answer.ids),
            degenerate_reason(answer.text, answer.ids),
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    )
    with file.open("w", encoding="utf-8") as stream:
        for sample in samples:
            stream.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
    for sample in samples:
        console.say(f"  > {sample.messages[-1].get('content', '')}")
        mark = f"  [{sample.degenerate}]" if sample.degenerate else ""
        console.say("    " + sample.text.strip().replace("\n", "\n    ") + mark)
    return samples


def require_sane(samples: Sequence[SanitySample]) -> None:
    """Raise GateFailed, with the answers, when two or more of them are degenerate."""
    bad = [sample for sample in samples if sample.degenerate]
    if len(bad) < TOO_MANY_DEGENERATE:
        return
    raise GateFailed(
        [
            Fault(
                f"look before you merge: {str(sample.messages[-1].get('content', ''))[:80]!r}",
                f"{sample.degenerate}: {sample.text.strip()[:80]!r}",
                "lower train.learning_rate or epochs, add rows, or use fewer layers",
            )
            for sample in bad
        ]
    )


TALK_PROMPTS = ("Hello", "What is the capital of France?")
SAMPLES = 5


@dataclass(frozen=True)
class Prompt:
    """Prompt for the assistant.

    messages: the conversation so far.
    tools: the tools it is offered (None: none).
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None


def choose_prompts(validation: Sequence[tuple[str | None, Prompt]]) -> list[Prompt]:
    """Return five prompts from (category, prompt) pairs and ordinary talk.

    One of each category comes first, in the given order. A row with only an answer has no prompt.
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
