"""Some positions taken out of all, and put back where they were, with gradients to match.

Does not: add up what comes twice, as MLX's own indexing has to, one element at a time on a CPU:
positions here are all different, so that each way is the gradient of the other.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_ft.train.gradients import with_gradient


def take(values: mx.array, positions: mx.array) -> mx.array:
    """Return the rows (N, width) of values (T, width) at positions (N), all different."""
    tokens = values.shape[0]
    return with_gradient(
        lambda values: values[positions], lambda _, slope: (_put(slope, positions, tokens),)
    )(values)


def put(values: mx.array, positions: mx.array, tokens: int) -> mx.array:
    """Return (tokens, width) with the rows of values (N, width) at positions (N), all different,
    and zero elsewhere.
    """
    return with_gradient(
        lambda values: _put(values, positions, tokens), lambda _, slope: (slope[positions],)
    )(values)


def _put(values: mx.array, positions: mx.array, tokens: int) -> mx.array:
    count = positions.size
    # Of each token the row that it gets; the one behind the last is zero.
    row = mx.full((tokens,), count, mx.int32).at[positions].add(mx.arange(count) - count)
    nothing = mx.zeros((1, values.shape[1]), values.dtype)
    return mx.concatenate([values, nothing])[row]
