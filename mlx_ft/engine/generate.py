"""Load a model with MLX, and generate from it in batches.

Does: choose how a model is held and computed on this machine (and say so), attach an adapter after
checking that it fits entirely, generate greedily from token ids. Does not: resolve names
(`model/resolve.py`), render conversations (`model/chat.py`), or score anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_ft.engine.decoding import answer_prompts
from mlx_ft.engine.load import LoadedModel


@dataclass(frozen=True)
class Generation:
    """One answer: text without control tokens, its ids (stop token excluded), and why it ended.

    `finish_reason` is "stop" (a stop token), "length" (max_tokens reached), or "loop" (ended, as
    its tokens only repeated themselves).
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    batch_size: int = 32,
    on_done: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """Generate greedily from prompts of token ids, `batch_size` at a time.

    `max_tokens` is for all prompts or one for each. Results come back in the order given, and
    `on_done(index, generation)` is called as each one ends.
    """
    results: dict[int, Generation] = {}

    def on_end(index: int, ids: tuple[int, ...], reason: str) -> None:
        results[index] = Generation(loaded.renderer.decode(ids), ids, reason)
        if on_done is not None:
            on_done(index, results[index])

    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    answer_prompts(
        loaded.model,
        prompts,
        stop_ids=loaded.renderer.stop_ids,
        max_tokens=limits,
        batch_size=batch_size,
        on_end=on_end,
    )
    return [results[index] for index in range(len(prompts))]
