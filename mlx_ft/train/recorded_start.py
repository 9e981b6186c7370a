"""Stand-ins for key-value caches: one keeps what a row puts into it, the other goes on from there.

Does not: know what the row is, or compute it.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models.cache import create_attention_mask


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
