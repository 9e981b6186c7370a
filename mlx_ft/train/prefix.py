"""Outputs of the frozen layers, computed once a row and kept in memory.

A row is always computed alone, continuing the start that all rows of the split share, so its bits
do not depend on when or beside what it was computed. Does not: keep anything on disk, or know what
a row means.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_ft.tokens import TokenizedSplit
from mlx_ft.train.forward import Forward
from mlx_ft.train.losses import Batch
from mlx_ft.train.shared_start import SharedStart


class PrefixCache:
    """Prefix states of the rows of one split; beyond `limit_bytes` they are computed every time."""

    def __init__(
        self,
        forward: Forward,
        split: TokenizedSplit,
        limit_bytes: int,
        start: SharedStart | None = None,
    ) -> None:
        self._forward = forward
        self._start = start
        self._split = split
        self._rows: dict[int, mx.array] = {}
        self._limit_bytes = limit_bytes
        self.held_bytes = 0

    def _compute(self, row: int) -> mx.array:
        ids = self._split.row(row)[0][:-1].tolist()
        if self._start is not None:
            state = self._start.row(ids)
        else:
            state = self._forward.prefix(mx.array([ids]))[0]
        mx.eval(state)
        return state

    @property
    def shared_tokens(self) -> int:
        """How many first tokens are the same in every row and predict nothing that is trained."""
        return 0 if self._start is None else self._start.unpredicting_tokens

    def row(self, row: int) -> mx.array:
        """Return the states (T, hidden) of a row's tokens but the last."""
        if row in self._rows:
            return self._rows[row]
        state = self._compute(row)
        if self.held_bytes + state.nbytes <= self._limit_bytes:
            self._rows[row] = state
            self.held_bytes += state.nbytes
        return state

    def batch(self, batch: Batch) -> mx.array:
        """Return the prefix (B, T, hidden) of a batch, zero where it is padded."""
        if self._forward.frozen_layers == 0:
            return mx.zeros((*batch.ids.shape, 0))
        width = batch.ids.shape[1]
        states = [self.row(row) for row in batch.rows]
        return mx.stack([mx.pad(s, [(0, width - s.shape[0]), (0, 0)]) for s in states])

    def fill(self, on_row: Callable[[int, int], None]) -> None:
        """Compute every row that fits; `on_row(done, of)` after each."""
        if self._forward.frozen_layers == 0:
            return
        total = len(self._split)
        for row in range(total):
            self.row(row)
            on_row(row + 1, total)
            if self.held_bytes >= self._limit_bytes:
                return
