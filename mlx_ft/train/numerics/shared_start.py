"""Stand-ins for key-value caches: one keeps what a row puts into it, the other goes on from there.

Does not: know what the row is, or compute it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, create_attention_mask, make_prompt_cache

from mlx_ft.data.tokens import TokenizedSplit
from mlx_ft.engine.partial_model import EQUAL_TOLERANCE, relative_difference
from mlx_ft.train.numerics.forward import Forward, SplitForward
from mlx_ft.train.numerics.packing import Packing


class Recorder:
    """Takes the place of a layer's key-value cache and keeps what one row puts into it."""

    offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values


class Follower:
    """A cache that holds one row's recorded keys and values for every row of a batch.

    Unlike a cache for generation, gradients pass through it to the recorded row.
    """

    def __init__(self, recorder: Recorder, tokens: int) -> None:
        self._recorder = recorder
        self.offset = tokens

    def make_mask(
        self, tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Return the mask of so many tokens that come after the recorded ones."""
        mask: mx.array | str | None = create_attention_mask(
            tokens, self.offset, return_array, window_size
        )
        return mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        rows = keys.shape[0]
        before = (
            mx.broadcast_to(array, (rows, *array.shape[1:]))
            for array in (self._recorder.keys, self._recorder.values)
        )
        one, other = (
            mx.concatenate([earlier, later], axis=2)
            for earlier, later in zip(before, (keys, values), strict=True)
        )
        return one, other


# A shorter start saves less than its extra step costs.
MIN_START_TOKENS = 8


def common_start(splits: Sequence[TokenizedSplit]) -> list[int]:
    """Return the ids that every row begins with, short of the two last tokens of any row."""
    rows = [split.row(index)[0] for split in splits for index in range(len(split))]
    length = max(0, min(map(len, rows)) - 2)
    for row in rows:
        differs = np.flatnonzero(row[:length] != rows[0][:length])
        if len(differs):
            length = int(differs[0])
    return [int(token) for token in rows[0][:length]]


def first_predicting(splits: Sequence[TokenizedSplit]) -> int:
    """Return the first position, in any row, whose next token is trained."""
    return min(
        int(np.flatnonzero(trained[1:])[0])
        for split in splits
        for trained in (split.row(index)[1] for index in range(len(split)))
        if trained[1:].any()
    )


class SharedStart:
    """States and keys of the common start: `states` is (tokens, hidden).

    `unpredicting_tokens` of them predict nothing that is trained, so that the trained layers too
    can take them once a batch instead of once a row where rows are packed.
    """

    def __init__(
        self, forward: SplitForward, ids: Sequence[int], unpredicting_tokens: int = 0
    ) -> None:
        self._forward = forward
        self.tokens = len(ids)
        self.unpredicting_tokens = min(len(ids), unpredicting_tokens)
        self._recorders = [Recorder() for _ in range(forward.layer_count)]
        self.states = forward.prefix_after(mx.array([list(ids)]), self._recorders)[0]
        seen = self._recorders[: forward.frozen_layers]
        mx.eval(self.states, [(recorder.keys, recorder.values) for recorder in seen])

    def rows(self, ids: mx.array) -> mx.array:
        """Return the prefix states (B, T, hidden) of rows (B, T) that begin with the start."""
        followers = [Follower(recorder, self.tokens) for recorder in self._recorders]
        rest = self._forward.prefix_after(ids[:, self.tokens :], followers)
        start = mx.broadcast_to(self.states, (ids.shape[0], *self.states.shape))
        return mx.concatenate([start, rest], axis=1)


def choose_start(
    model: nn.Module, forward: Forward, splits: Sequence[TokenizedSplit]
) -> SharedStart | None:
    """Return the shared start of some splits, or None when there is none, or it does not hold.

    It holds when the model keeps plain keys and values and a row, continued from the start, has the
    states that it has as a whole. Plain keys do not change with the length of what follows, so that
    the row need not be a long one.
    """
    if not isinstance(forward, SplitForward) or forward.frozen_layers == 0:
        return None
    if forward.streamed_from is not None:  # the proof would hold all frozen weights at once
        return None
    ids = common_start(splits)
    if len(ids) < MIN_START_TOKENS:
        return None
    # Sliding windows and recurrent states have caches of their own kind.
    if any(type(cache) is not KVCache for cache in make_prompt_cache(model)):
        return None
    median = int(np.argsort(splits[0].lengths)[len(splits[0]) // 2])
    row = splits[0].row(median)[0][:-1].tolist()
    try:
        start = SharedStart(forward, ids, first_predicting(splits))
        differences = list(_differences(forward, start, row))
    except Exception:  # any model's code, called in a way that its author did not plan
        return None
    # Written so that NaN fails.
    return start if all(each <= EQUAL_TOLERANCE for each in differences) else None


def _differences(forward: SplitForward, start: SharedStart, row: Sequence[int]) -> Iterator[float]:
    """Yield how far a row's states, continued from the start, are from those of the whole row."""
    ids = mx.array([list(row)])
    yield relative_difference(start.rows(ids), forward.prefix(ids))
    if forward.packs:
        yield _packed_difference(forward, row, start.unpredicting_tokens)


def _packed_difference(forward: SplitForward, row: Sequence[int], shared: int) -> float:
    """Return how far a row's final states are, when it comes second behind a start that both rows
    share, from those that it has alone.
    """
    own = len(row) - shared
    ids = mx.array([[*row, *row[shared:]]])
    alone = mx.array([list(row)])
    prefix = forward.prefix(alone)
    behind = mx.concatenate([prefix, prefix[:, shared:]], axis=1)
    together = forward.top(ids, behind, Packing(shared, (own, own)))
    return relative_difference(together[:, -own:], forward.top(alone, prefix)[:, shared:])
