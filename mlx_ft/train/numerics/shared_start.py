"""Common first tokens of all rows, computed once.

Does: record the keys and values of the common start; continue every row from them; prove that this
holds for a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, create_attention_mask, make_prompt_cache

from mlx_ft.data.tokens import TokenizedSplit
from mlx_ft.engine.partial_model import EQUAL_TOLERANCE, SIXTEEN_BITS, relative_difference
from mlx_ft.system.gpu_errors import device_failure
from mlx_ft.train.numerics.forward import Forward, SplitForward, top_of_packed
from mlx_ft.train.numerics.packing import Packing


class Recorder:
    """Stand-in for a layer's key-value cache that keeps the keys and values of one row."""

    offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values


class Follower:
    """Stand-in for a cache, with one row's recorded keys and values for every row of a batch.

    Unlike a cache for generation, gradients pass through it to the recorded row.
    """

    def __init__(self, recorder: Recorder, tokens: int) -> None:
        self._recorder = recorder
        self.offset = tokens

    def make_mask(
        self, tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Return the mask of `tokens` tokens after the recorded ones."""
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
    """States and keys of the common start.

    tokens: its length.
    states: its prefix states (tokens, hidden).
    unpredicting_tokens: first tokens of it that predict no trained token. Where rows are packed,
        the trained layers too compute them once a batch instead of once a row.
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

    It holds when the model keeps plain keys and values, and a row continued from the start has the
    same states as the whole row. Plain keys do not depend on the tokens that follow, so the row
    need not be long.
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
    predicting = first_predicting(splits)
    try:
        start = wide = SharedStart(forward, ids, predicting)
        # A continued row has products of other shapes, whose 16-bit results differ on a GPU.
        with forward.in_float32():
            if start.states.dtype in SIXTEEN_BITS:
                wide = SharedStart(forward, ids, predicting)
            differences = list(_differences(forward, wide, row))
    except Exception as error:  # any model's code, called in a way that its author did not plan
        if device_failure(error):
            raise
        return None
    # Written so that NaN fails.
    return start if all(each <= EQUAL_TOLERANCE for each in differences) else None


def _differences(forward: SplitForward, start: SharedStart, row: Sequence[int]) -> Iterator[float]:
    """Yield differences between a row continued from the start and the whole row."""
    ids = mx.array([list(row)])
    yield relative_difference(start.rows(ids), forward.prefix(ids))
    if forward.packs:
        yield _packed_difference(forward, row, start.unpredicting_tokens)


def _packed_difference(forward: SplitForward, row: Sequence[int], shared: int) -> float:
    """Return the difference of a row's final states, alone or packed behind a shared start."""
    own = len(row) - shared
    ids = mx.array([[*row, *row[shared:]]])
    alone = mx.array([list(row)])
    prefix = forward.prefix(alone)
    behind = mx.concatenate([prefix, prefix[:, shared:]], axis=1)
    together = top_of_packed(forward, ids, behind, Packing(shared, (own, own)))
    return relative_difference(together[:, -own:], forward.top(alone, prefix)[:, shared:])
