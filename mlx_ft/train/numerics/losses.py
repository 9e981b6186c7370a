"""Exact weighted cross-entropy: a sum over trained tokens, divided once per optimizer step.

loss = sum of weighted cross-entropy / sum of weights, over the whole step (DESIGN of this package:
batch 4 = batch 1 x accumulation 4). mlx-lm averages averages and counts one padding token per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_ft.data.tokens import TokenizedSplit, Weights, pad_rows
from mlx_ft.engine.cpu_kernels import PART_ELEMENTS, exp_is_slow, exp_of_differences
from mlx_ft.engine.device import on_cpu
from mlx_ft.recipe.train import LOGITS_PART_BYTES
from mlx_ft.train.numerics.buckets import OTHER_STEPS, TOKEN_STEPS, bucket
from mlx_ft.train.numerics.custom_vjp import take
from mlx_ft.train.numerics.forward import Forward
from mlx_ft.train.numerics.packed_places import PackedPlaces, places_of
from mlx_ft.train.numerics.packing import Packing

Result = TypeVar("Result", mx.array, tuple[mx.array, mx.array])


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together, with N trained predictions.

    ids: (B, T), one padded row each, or (1, T), packed rows.
    packing: layout of packed rows (None: padded).
    places: the same as arrays, where a GPU packs two rows or more.
    positions: flat positions (N) within (B x T) that predict a trained token.
    targets: the trained tokens (N).
    trained_tokens: N; on a GPU there are more positions, whose targets have the weight 0.
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
    packing = None
    if shared_tokens is None:
        ids = pad_rows(before)
        if not on_cpu():
            ids = _padded(ids, bucket(ids.shape[1] + 1, TOKEN_STEPS), axis=1)
        starts = [index * ids.shape[1] for index in range(len(rows))]
    else:
        packing = Packing(shared_tokens, tuple(len(each) - shared_tokens for each in before))
        joined = [before[0][:shared_tokens], *(each[shared_tokens:] for each in before)]
        ids = np.concatenate(joined)[None]
        starts = [start - shared_tokens for start in packing.starts]
    places = places_of(packing)
    if packing is not None and not on_cpu():
        tokens = bucket(packing.tokens + 1, TOKEN_STEPS) if places is None else places.tokens
        ids = _padded(ids, tokens, axis=1)
    positions = np.concatenate([s + p for s, p in zip(starts, predicted, strict=True)])
    targets = np.concatenate(
        [each[1:][p] for (each, _), p in zip(contents, predicted, strict=True)]
    )
    weights = _weights_of(split, rows, predicted)
    count, weight = len(positions), float(len(positions) if weights is None else weights.sum())
    if not on_cpu():
        positions, targets, weights = _in_bucket(positions, targets, weights, ids.size)
    return Batch(
        mx.array(ids),
        packing,
        places,
        mx.array(positions.astype(np.int32)),
        mx.array(targets.astype(np.int32)),
        count,
        rows,
        tuple(map(len, before)),
        None if weights is None else mx.array(weights),
        weight,
    )


def _padded(array: npt.NDArray[Any], size: int, axis: int = 0, fill: int = 0) -> npt.NDArray[Any]:
    """Return an array with more of `fill` at the end of an axis, up to a size."""
    widths = [(0, size - array.shape[axis] if at == axis else 0) for at in range(array.ndim)]
    return np.pad(array, widths, constant_values=fill)


def _in_bucket(
    positions: npt.NDArray[Any], targets: npt.NDArray[Any], weights: Weights | None, tokens: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], Weights]:
    """Return trained positions, targets and weights, padded to a size that is compiled.

    The others are at the last token, which is padding, and weigh nothing.
    """
    size = bucket(len(positions), OTHER_STEPS)
    if weights is None:
        weights = np.ones(len(positions), np.float32)
    return (
        _padded(positions, size, fill=tokens - 1),
        _padded(targets, size),
        _padded(weights.astype(np.float32), size),
    )


def _weights_of(
    split: TokenizedSplit, rows: Sequence[int], predicted: Sequence[npt.NDArray[np.int64]]
) -> Weights | None:
    """Return the weights of predictions in all rows, or None when each weighs 1."""
    of_rows = [split.row_weights(row) for row in rows]
    found = [w[1:][p] for w, p in zip(of_rows, predicted, strict=True) if w is not None]
    return np.concatenate(found) if found else None


def cross_entropy_sum(
    forward: Forward, batch: Batch, prefix: mx.array, *, with_gradient: bool = True
) -> mx.array:
    """Return the weighted sum (not mean) of cross-entropy over the trained tokens, in float32.

    It may be differentiated only with `with_gradient`.
    """
    hidden = forward.top(batch.ids, prefix, batch.places or batch.packing, batch.positions)
    trained = take(hidden.reshape(-1, hidden.shape[-1]), batch.positions)
    if not forward.head_is_frozen:
        logits = forward.head(trained).astype(mx.float32)
        loss: mx.array = nn.losses.cross_entropy(
            logits, batch.targets, weights=batch.weights, reduction="sum"
        )
        return loss
    loss_of = frozen_head_loss if with_gradient else frozen_head_loss_alone
    return loss_of(forward, trained, batch.targets, batch.weights)


def frozen_head_loss(
    forward: Forward, hidden: mx.array, targets: mx.array, weights: mx.array | None = None
) -> mx.array:
    """Return the summed cross-entropy of hidden states (N, hidden) against `targets` (N).

    weights: weight of each (N) (None: 1).

    For a head that is not trained: loss and gradient come from the same exponentials, a few
    positions at a time, so that the logits of all positions never exist together.
    """
    if hidden.shape[0] == 0:
        return mx.zeros(())

    @mx.custom_function
    def loss_and_gradient(hidden: mx.array) -> tuple[mx.array, mx.array]:
        parts = _one_after_another(
            forward,
            hidden,
            lambda part, rows: _loss_and_gradient(
                forward, part, targets[rows], None if weights is None else weights[rows]
            ),
        )
        loss = mx.sum(mx.stack([part for part, _ in parts]))
        return loss, mx.concatenate([part for _, part in parts])

    @loss_and_gradient.vjp
    def gradient(hidden: mx.array, cotangents: Any, outputs: Any) -> mx.array:
        scaled: mx.array = cotangents[0] * outputs[1]
        return scaled.astype(hidden.dtype)

    result: Any = loss_and_gradient(hidden)
    loss: mx.array = result[0]
    return loss


def frozen_head_loss_alone(
    forward: Forward, hidden: mx.array, targets: mx.array, weights: mx.array | None = None
) -> mx.array:
    """Return the same bits as `frozen_head_loss`, without the work that only a gradient needs."""
    if hidden.shape[0] == 0:
        return mx.zeros(())

    def loss_of(part: mx.array, rows: slice) -> mx.array:
        logits, wanted = forward.head(part).astype(mx.float32), targets[rows]
        few = [_exponentials(logits[some], wanted[some]).losses for some in _few_rows(logits)]
        losses = mx.concatenate(few)
        return mx.sum(losses if weights is None else losses * weights[rows, None])

    return mx.sum(mx.stack(_one_after_another(forward, hidden, loss_of)))


def _one_after_another(
    forward: Forward, hidden: mx.array, of_part: Callable[[mx.array, slice], Result]
) -> list[Result]:
    """Return `of_part` of each part of hidden states (N, hidden) and its rows, one after another.

    The logits of a part fit within the limit.
    """
    results: list[Result] = []
    for ends in _ranges(hidden.shape[0], _positions_at_a_time(forward, hidden)):
        part = hidden[slice(*ends)]
        if results:  # else MLX would begin all parts before it ends one
            part = mx.depends(part, results[-1])
        results.append(of_part(part, slice(*ends)))
    return results


def _positions_at_a_time(forward: Forward, hidden: mx.array) -> int:
    vocabulary = forward.head(hidden[:1]).shape[-1]
    return max(1, LOGITS_PART_BYTES // (4 * vocabulary))


@dataclass(frozen=True)
class _Exponentials:
    """exp(logits - their largest) (N, vocabulary), their sums and the losses (N, 1)."""

    values: mx.array
    total: mx.array
    losses: mx.array


def _exponentials(logits: mx.array, targets: mx.array) -> _Exponentials:
    largest = mx.max(logits, axis=-1, keepdims=True)
    values = exp_of_differences(logits - largest)
    total = mx.sum(values, axis=-1, keepdims=True)
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)
    return _Exponentials(values, total, mx.log(total) + largest - picked)


def _few_rows(logits: mx.array) -> list[slice]:
    """Return the rows of logits (N, vocabulary) in slices that are best computed one by one.

    On a CPU all intermediate values of a few rows stay in its cache.
    """
    count, vocabulary = logits.shape
    at_a_time = max(1, PART_ELEMENTS // vocabulary) if exp_is_slow() else count
    return [slice(*ends) for ends in _ranges(count, at_a_time)]


def _ranges(total: int, size: int) -> list[tuple[int, int]]:
    """Return (first, end) of as few ranges as possible of at most `size`, as even as possible.

    A product with a few rows takes nearly as long as one with many.
    """
    parts = -(-total // size)
    return list(pairwise(total * part // parts for part in range(parts + 1)))


def _loss_and_gradient(
    forward: Forward, hidden: mx.array, targets: mx.array, weights: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Return the summed loss and its gradient for `hidden`.

    The gradient is softmax minus one-hot, then the head's own vector-Jacobian product.
    """

    def head(hidden: mx.array) -> mx.array:
        return forward.head(hidden).astype(mx.float32)

    logits = head(hidden)
    few = [
        _losses_and_slope(logits[rows], targets[rows], None if weights is None else weights[rows])
        for rows in _few_rows(logits)
    ]
    losses, slope = (mx.concatenate(list(parts)) for parts in zip(*few, strict=True))
    _, (gradient,) = mx.vjp(head, [hidden], [slope])
    return mx.sum(losses), gradient


def _losses_and_slope(
    logits: mx.array, targets: mx.array, weights: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Return the losses (N, 1) and their derivatives for the logits (N, vocabulary)."""
    exponentials, column = _exponentials(logits, targets), targets[:, None]
    losses, softmax = exponentials.losses, exponentials.values / exponentials.total
    of_target = mx.take_along_axis(softmax, column, axis=-1)
    slope = mx.put_along_axis(softmax, column, of_target - 1, axis=-1)
    if weights is not None:
        losses, slope = losses * weights[:, None], slope * weights[:, None]
    return losses, slope
