"""Generate answers to prompts of token ids, in batches.

Does not: render conversations (`model/chat.py`), or score anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_ft.engine.decoding import Decoded, OnDone, answer_prompts
from mlx_ft.engine.load import LoadedModel
from mlx_ft.recipe.cli_defaults import DEFAULT_BATCH_SIZE


@dataclass(frozen=True)
class Generation:
    """One answer.

    text: without control tokens.
    ids: its tokens, without the stop token.
    finish_reason: "stop", "length" or "loop"; see `Decoded`.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    batch_size: int = DEFAULT_BATCH_SIZE,
    on_done: OnDone[Generation] | None = None,
) -> list[Generation]:
    """Generate greedily from prompts of token ids, `batch_size` at a time.

    max_tokens: the longest answer, of all prompts or of each.
    on_done: called as each answer ends; the returned list is in the order of the prompts.
    """
    results: dict[int, Generation] = {}

    def decoded(index: int, answer: Decoded) -> None:
        text = loaded.renderer.decode(answer.ids)
        results[index] = Generation(text, answer.ids, answer.finish_reason)
        if on_done is not None:
            on_done(index, results[index])

    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    answer_prompts(
        loaded.model,
        prompts,
        stop_ids=loaded.renderer.stop_ids,
        max_tokens=limits,
        batch_size=batch_size,
        on_done=decoded,
    )
    return [results[index] for index in range(len(prompts))]
