"""Activations that are computed a second time instead of kept for the backward pass.

Does: a stand-in for a layer that keeps nothing but its input. Does not: decide which layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ft.cpu_math import fast_math

RANDOM_STATE: Any = mx.random.state  # a list of one array, which its type does not say


@contextmanager
def drawing_from(state: mx.array) -> Iterator[None]:
    """While it lasts, random numbers are drawn from this state of MLX's generator; afterwards they
    are what they would have been, unless the state was this one already.
    """
    before = RANDOM_STATE[0]
    if before is state:
        yield
        return
    _set_random_state(state)
    yield
    _set_random_state(before)


def _set_random_state(state: mx.array) -> None:
    high, low = map(int, np.array(state))  # a seed's upper and lower 32 bits
    mx.random.seed(high << 32 | low)


def checkpointed(
    layer: nn.Module, within: Callable[[nn.Module], AbstractContextManager[None]]
) -> nn.Module:
    """Return a stand-in for a layer, with the same parameters, that keeps none of its activations
    for the backward pass but computes them again (Chen et al., arXiv 1604.06174), `within` the same
    context.
    """
    original = type(layer)

    def call(_: nn.Module, *arguments: Any, **named: Any) -> mx.array:
        drawn_from = RANDOM_STATE[0]

        def compute(parameters: Any, *arguments: Any) -> mx.array:
            layer.update(parameters)
            # The second time nobody else is around it, and its dropout must draw the same masks.
            with fast_math(layer), within(layer), drawing_from(drawn_from):
                outputs: mx.array = layer(*arguments, **named)
            return outputs

        result: mx.array = mx.checkpoint(compute)(layer.trainable_parameters(), *arguments)
        return result

    twin = copy.copy(layer)
    # A class of its own for this layer alone: the model's own layers stay as they are.
    twin.__class__ = type(f"Checkpointed{original.__name__}", (original,), {"__call__": call})
    return twin
