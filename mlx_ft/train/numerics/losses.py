"""Exact weighted cross-entropy: a sum over trained tokens, divided once per optimizer step.

loss = sum of weighted cross-entropy / sum of weights, over the whole step (DESIGN of this package:
batch 4 = batch 1 x accumulation 4). mlx-lm averages averages and counts one padding token per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_ft.engine.cpu_kernels import PART_ELEMENTS, exp_is_slow, exp_of_differences
from mlx_ft.engine.device import on_cpu
from mlx_ft.recipe.train import GPU_LOGITS_PART_BYTES, LOGITS_PART_BYTES
from mlx_ft.train.numerics.batch import Batch
from mlx_ft.train.numerics.custom_vjp import take
from mlx_ft.train.numerics.forward import Forward

Result = TypeVar("Result", mx.array, tuple[mx.array, mx.array])


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
        losses = _losses(logits, wanted)
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
    part_bytes = LOGITS_PART_BYTES if on_cpu() else GPU_LOGITS_PART_BYTES
    return max(1, part_bytes // (4 * vocabulary))


def _losses(logits: mx.array, targets: mx.array) -> mx.array:
    """Return the losses (N, 1) of logits (N, vocabulary)."""
    if not on_cpu():
        return mx.fast.cross_entropy(logits, targets)[:, None]
    few = [_exponentials(logits[rows], targets[rows]).losses for rows in _few_rows(logits)]
    return mx.concatenate(few)


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
    if on_cpu():
        few = [_losses_and_slope(logits[rows], targets[rows]) for rows in _few_rows(logits)]
        losses, slope = (mx.concatenate(list(parts)) for parts in zip(*few, strict=True))
    else:
        losses, slope = _fused_losses_and_slope(logits, targets)
    if weights is not None:
        losses, slope = losses * weights[:, None], slope * weights[:, None]
    _, (gradient,) = mx.vjp(head, [hidden], [slope])
    return mx.sum(losses), gradient


def _losses_and_slope(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return the losses (N, 1) and their derivatives for the logits (N, vocabulary)."""
    exponentials, column = _exponentials(logits, targets), targets[:, None]
    losses, softmax = exponentials.losses, exponentials.values / exponentials.total
    of_target = mx.take_along_axis(softmax, column, axis=-1)
    return losses, mx.put_along_axis(softmax, column, of_target - 1, axis=-1)


def _fused_losses_and_slope(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return the same by MLX's fused loss; the slope is one kernel where MLX compiles."""
    losses, column = _losses(logits, targets), targets[:, None]
    log_total = losses + mx.take_along_axis(logits, column, axis=-1)
    is_target = mx.arange(logits.shape[1], dtype=targets.dtype) == column
    return losses, mx.exp(logits - log_total) - is_target
