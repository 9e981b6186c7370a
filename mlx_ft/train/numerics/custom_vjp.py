"""Functions of arrays with custom gradients; gather and scatter of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, cast

import mlx.core as mx

Function = Callable[..., mx.array]
# (inputs, slope of the output) -> slopes of the inputs
Gradient = Callable[[tuple[mx.array, ...], mx.array], tuple[mx.array, ...]]


def with_gradient(function: Function, gradient: Gradient) -> Function:
    """Return a function of one or more arrays whose gradient is `gradient`.

    No gradient passes to arrays that `function` closes over.
    """
    custom = mx.custom_function(function)

    @custom.vjp
    def slopes(inputs: Any, slope: mx.array, output: Any) -> Any:
        # MLX gives a single input as it is, and takes a single slope so.
        if isinstance(inputs, mx.array):
            return gradient((inputs,), slope)[0]
        return gradient(tuple(inputs), slope)

    return lambda *arrays: cast(mx.array, custom(*arrays))


def parts_of(array: mx.array, sizes: Sequence[int], axis: int = 0) -> list[mx.array]:
    """Return consecutive parts of an array, of these sizes along an axis.

    MLX's own split and slices have a gradient of the whole array's size for each part.
    """
    ends = list(accumulate(sizes[:-1]))

    @mx.custom_function
    def split(array: mx.array) -> Any:
        return mx.split(array, ends, axis=axis)

    @split.vjp
    def together(array: mx.array, slopes: Any, _: Any) -> mx.array:
        return mx.concatenate(list(slopes), axis=axis)

    if not ends:
        return [array]
    found: Any = split(array)
    return list(found)


def take(values: mx.array, positions: mx.array) -> mx.array:
    """Return the rows (N, width) of values (T, width) at positions (N).

    A position that is there twice may have a gradient in its first row only.
    """
    tokens = values.shape[0]
    return with_gradient(
        lambda values: values[positions], lambda _, slope: (_put(slope, positions, tokens),)
    )(values)


def put(values: mx.array, positions: mx.array, tokens: int) -> mx.array:
    """Return (tokens, width) with the rows of values (N, width) at positions (N), and zero
    elsewhere; the first row of a position that is there twice.
    """
    return with_gradient(
        lambda values: _put(values, positions, tokens), lambda _, slope: (slope[positions],)
    )(values)


def _put(values: mx.array, positions: mx.array, tokens: int) -> mx.array:
    count = positions.size
    # Of each token the row that it gets; the one behind the last is zero.
    row = mx.full((tokens,), count, mx.int32).at[positions].minimum(mx.arange(count))
    nothing = mx.zeros((1, values.shape[1]), values.dtype)
    return mx.concatenate([values, nothing])[row]
