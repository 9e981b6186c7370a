"""Functions of arrays with gradients of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

Function = Callable[..., mx.array]
# (inputs, slope of the output) -> slopes of the inputs
Gradient = Callable[[tuple[mx.array, ...], mx.array], tuple[mx.array, ...]]


def with_gradient(function: Function, gradient: Gradient) -> Function:
    """Return a function of arrays, one at least, that is differentiated by `gradient`.

    No gradient passes to arrays that `function` takes from elsewhere.
    """
    custom = mx.custom_function(function)

    @custom.vjp
    def slopes(inputs: Any, slope: mx.array, output: Any) -> Any:
        # MLX gives a single input as it is, and takes a single slope so.
        if isinstance(inputs, mx.array):
            return gradient((inputs,), slope)[0]
        return gradient(tuple(inputs), slope)

    return lambda *arrays: cast(mx.array, custom(*arrays))
