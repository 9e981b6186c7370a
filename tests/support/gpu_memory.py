"""What a GPU's fast operations keep for a gradient, on a CPU, whose own parts keep more.

MLX's norm and attention are one kernel each on Metal. Their gradients need their inputs alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx

from mlx_ft.train.numerics.custom_vjp import with_gradient

Function = Callable[..., mx.array]
FEW = 16


def _keeping_inputs(function: Function, arrays: int) -> Function:
    """Return a function of so many arrays, then of other arguments, that keeps its inputs alone."""

    def call(*arguments: Any, **named: Any) -> mx.array:
        def plain(*inputs: mx.array) -> mx.array:
            return function(*inputs, *arguments[arrays:], **named)

        def gradient(inputs: tuple[mx.array, ...], slope: mx.array) -> tuple[mx.array, ...]:
            first, *others = inputs
            return tuple(mx.vjp(plain, [mx.depends(first, slope), *others], [slope])[1])

        return with_gradient(plain, gradient)(*arguments[:arrays])

    return call


def _a_few_rows_at_a_time(loss: Function) -> Function:
    """Return MLX's loss, which on Metal is one kernel without arrays of the logits' size."""

    def of_rows(logits: mx.array, targets: mx.array) -> mx.array:
        found: list[mx.array] = []
        for first in range(0, logits.shape[0], FEW):
            part = logits[first : first + FEW]
            after = mx.depends(part, found[-1]) if found else part
            found.append(loss(after, targets[first : first + FEW]))
        return mx.concatenate(found)

    return of_rows


@contextmanager
def kept_as_on_metal() -> Iterator[None]:
    """Within, norms and attention keep their inputs for the gradient, and nothing else; the loss
    makes no array of the logits' size.
    """
    attention: Any = mx.fast.scaled_dot_product_attention
    norm: Any = mx.fast.rms_norm
    with (
        mock.patch.object(mx.fast, "rms_norm", _keeping_inputs(norm, 2)),
        mock.patch.object(mx.fast, "cross_entropy", _a_few_rows_at_a_time(mx.fast.cross_entropy)),
        mock.patch.object(mx.fast, "scaled_dot_product_attention", _keeping_inputs(attention, 3)),
    ):
        yield
