"""Rows that go through the model together, padded or packed, in sizes that suit the device.

A CPU gets exact sizes. A GPU gets few sizes, of which a compiled step serves each: padding comes
last and its targets weigh nothing, so sums do not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_ft.data.tokens import Ids, TokenizedSplit, Weights, pad_rows
from mlx_ft.engine.device import on_cpu
from mlx_ft.train.numerics.buckets import OTHER_STEPS, TOKEN_STEPS, bucket
from mlx_ft.train.numerics.packed_places import PackedPlaces, places_of
from mlx_ft.train.numerics.packing import Packing

# Rows that are packed by places have their queries, keys, values and outputs gathered in each
# layer: about as much time as so many padded tokens, for one token.
GATHERING_SHARE = 1 / 32


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together, with N trained predictions.

    ids: (B, T), one padded row each, or (1, T), packed rows.
    packing: layout of packed rows (None: padded).
    places: the same as arrays, where a GPU packs two rows or more.
    positions: flat positions (N) within (B x T) that predict a trained token.
    targets: the trained tokens (N).
    trained_tokens: N; where sizes are few there are more positions, which weigh nothing.
    rows: indices of the rows in their split.
    lengths: unpadded lengths of the rows (tokens).
    weights: weights (N) of the predictions (None: each is 1).
    weight: their sum.
    """

    ids: mx.array
    packing: Packing | None
    places: PackedPlaces | None
    positions: mx.array
    targets: mx.array
    trained_tokens: int
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    weights: mx.array | None
    weight: float

    @property
    def tokens(self) -> int:
        """Real tokens; shared tokens are counted for each row."""
        return sum(self.lengths)

    @property
    def padded_tokens(self) -> int:
        """Tokens of the rows with their padding."""
        if self.packing is None:
            return int(self.ids.size)
        return self.tokens + int(self.ids.size) - self.packing.tokens

    @property
    def arrays(self) -> dict[str, mx.array]:
        """All that two batches of the same sizes differ in."""
        named = {"ids": self.ids, "positions": self.positions, "targets": self.targets}
        if self.weights is not None:
            named["weights"] = self.weights
        return named | ({} if self.places is None else self.places.arrays)

    def with_arrays(self, arrays: Mapping[str, mx.array]) -> Batch:
        """Return a batch of these sizes with other `arrays`."""
        return replace(
            self,
            ids=arrays["ids"],
            places=None if self.places is None else self.places.with_arrays(arrays),
            positions=arrays["positions"],
            targets=arrays["targets"],
            weights=arrays.get("weights"),
        )


@dataclass(frozen=True)
class _Laid:
    """Ids (B, T), where each row begins in (B x T), a flat position without a trained prediction,
    and the layout of packed rows.
    """

    ids: Ids
    starts: tuple[int, ...]
    spare: int
    packing: Packing | None = None
    places: PackedPlaces | None = None


def make_batch(
    split: TokenizedSplit, rows: tuple[int, ...], shared_tokens: int | None = None
) -> Batch:
    """Return the rows padded on the right to the longest of them; or packed, with `shared_tokens`.

    shared_tokens: number of first tokens, equal in all rows, that a packed batch holds only once.

    The last token of a row predicts nothing, so it does not go through the model. Padding is never
    a target and, with causal attention, never seen by a real token.
    """
    contents = [split.row(row) for row in rows]
    before = [ids[:-1] for ids, _ in contents]
    predicted = [np.flatnonzero(trained[1:]) for _, trained in contents]
    laid = _laid(before, predicted, shared_tokens)
    positions = np.concatenate([s + p for s, p in zip(laid.starts, predicted, strict=True)])
    targets = np.concatenate(
        [each[1:][p] for (each, _), p in zip(contents, predicted, strict=True)]
    )
    weights = _weights_of(split, rows, predicted)
    count, weight = len(positions), float(len(positions) if weights is None else weights.sum())
    if not on_cpu():
        size = bucket(count, OTHER_STEPS)
        weights = np.ones(count, np.float32) if weights is None else weights
        positions = _padded(positions, size, fill=laid.spare)
        targets, weights = _padded(targets, size), _padded(weights, size)
    return Batch(
        mx.array(laid.ids),
        laid.packing,
        laid.places,
        mx.array(positions.astype(np.int32)),
        mx.array(targets.astype(np.int32)),
        count,
        rows,
        tuple(map(len, before)),
        None if weights is None else mx.array(weights),
        weight,
    )


def _laid(
    before: Sequence[Ids], predicted: Sequence[npt.NDArray[np.int64]], shared_tokens: int | None
) -> _Laid:
    """Return the rows' tokens as they go through the model."""
    if shared_tokens is None:
        return _rows_padded(before, predicted)
    packed = _rows_packed(before, shared_tokens)
    if packed.places is None or shared_tokens > 0:
        return packed
    padded = _rows_padded(before, predicted)
    return padded if padded.ids.size <= packed.ids.size * (1 + GATHERING_SHARE) else packed


def _rows_padded(before: Sequence[Ids], predicted: Sequence[npt.NDArray[np.int64]]) -> _Laid:
    ids, spare = pad_rows(before), 0
    if not on_cpu():
        places = np.arange(len(before[0]))
        untrained = np.setdiff1d(places, predicted[0])
        # The first row has one as a rule: its prompt.
        width = bucket(ids.shape[1] + (untrained.size == 0), TOKEN_STEPS)
        ids = _padded(ids, width, axis=1)
        spare = int(untrained[0]) if untrained.size else width - 1
    starts = tuple(index * ids.shape[1] for index in range(len(before)))
    return _Laid(ids, starts, spare)


def _rows_packed(before: Sequence[Ids], shared: int) -> _Laid:
    packing = Packing(shared, tuple(len(each) - shared for each in before))
    ids = np.concatenate([before[0][:shared], *(each[shared:] for each in before)])[None]
    places = places_of(packing)
    if not on_cpu():
        tokens = bucket(packing.tokens + 1, TOKEN_STEPS) if places is None else places.tokens
        ids = _padded(ids, tokens, axis=1)
    starts = tuple(start - shared for start in packing.starts)
    return _Laid(ids, starts, ids.size - 1, packing, places)


def _padded(array: npt.NDArray[Any], size: int, axis: int = 0, fill: int = 0) -> npt.NDArray[Any]:
    """Return an array with more of `fill` at the end of an axis, up to a size."""
    widths = [(0, size - array.shape[axis] if at == axis else 0) for at in range(array.ndim)]
    return np.pad(array, widths, constant_values=fill)


def _weights_of(
    split: TokenizedSplit, rows: Sequence[int], predicted: Sequence[npt.NDArray[np.int64]]
) -> Weights | None:
    """Return the weights of predictions in all rows, or None when each weighs 1."""
    of_rows = [split.row_weights(row) for row in rows]
    found = [w[1:][p] for w, p in zip(of_rows, predicted, strict=True) if w is not None]
    return np.concatenate(found) if found else None
