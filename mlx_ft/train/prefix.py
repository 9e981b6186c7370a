"""Outputs of the frozen layers, computed once a row and kept in memory.

Rows are computed in groups of similar length that depend on the split alone, so a resumed run
finds the same bits. Does not: keep anything on disk, or know what a row means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_ft.tokens import TokenizedSplit, group_rows, pad_rows
from mlx_ft.train.forward import Forward
from mlx_ft.train.losses import Batch
from mlx_ft.train.shared_start import SharedStart

# Enough to keep the processor busy; more would only pad more and take more memory.
GROUP_TOKENS = 1024


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

    @property
    def shared_tokens(self) -> int:
        """How many first tokens are the same in every row and predict nothing that is trained."""
        return 0 if self._start is None else self._start.unpredicting_tokens

    def _compute(self, rows: Sequence[int]) -> list[mx.array]:
        """Return the states (T, hidden) of each row's tokens but the last, computed together."""
        contents = [self._split.row(row)[0][:-1] for row in rows]
        after = self._forward.prefix if self._start is None else self._start.rows
        together = after(mx.array(pad_rows(contents)))
        # Copies: a slice would hold the padding of its whole group.
        states = [mx.contiguous(together[index, : len(ids)]) for index, ids in enumerate(contents)]
        mx.eval(states)
        return states

    def batch(self, batch: Batch) -> mx.array:
        """Return the prefix (B, T, hidden) of a batch, zero where it is padded."""
        if self._forward.frozen_layers == 0:
            return mx.zeros((*batch.ids.shape, 0))
        missing = [row for row in batch.rows if row not in self._rows]
        computed = dict(zip(missing, self._compute(missing) if missing else [], strict=True))
        states = [self._rows[row] if row in self._rows else computed[row] for row in batch.rows]
        width = batch.ids.shape[1]
        return mx.stack([mx.pad(s, [(0, width - s.shape[0]), (0, 0)]) for s in states])

    def fill(self, on_rows: Callable[[int, int], None]) -> None:
        """Compute every row that fits; `on_rows(done, of)` after each group."""
        if self._forward.frozen_layers == 0:
            return
        for group in group_rows(self._split.lengths, GROUP_TOKENS):
            states = self._compute(group)
            group_bytes = sum(state.nbytes for state in states)
            if self.held_bytes + group_bytes > self._limit_bytes:
                return
            self._rows.update(zip(group, states, strict=True))
            self.held_bytes += group_bytes
            on_rows(len(self._rows), len(self._split))
