"""A part of a model as the whole model with stand-ins for its other layers.

So what depends on a layer's number, or happens before the first layer, stays as it is. Does not:
say whether a model's author planned for this; whoever uses it proves it on real rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def passing(layer: nn.Module, output: Callable[[mx.array], mx.array]) -> nn.Module:
    """Return a stand-in for a layer that computes nothing: it gives `output` of its input.

    It keeps the layer's class and plain attributes, which a model may ask for, and no parameters.
    """

    def call(_: nn.Module, hidden: mx.array, *arguments: Any, **named: Any) -> mx.array:
        return output(hidden)

    twin = copy.copy(layer)
    twin.clear()
    original = type(layer)
    twin.__class__ = type(f"Passing{original.__name__}", (original,), {"__call__": call})
    return twin


def unchanged(hidden: mx.array) -> mx.array:
    """Return the hidden states as they come: the output of a layer that does nothing."""
    return hidden


def with_layers(inner: nn.Module, layers: Sequence[nn.Module], *, norm: bool) -> nn.Module:
    """Return an inner model (`embed_tokens`, `layers`, `norm`) with other layers, and perhaps
    without its last norm; every parameter is shared.
    """
    part = copy.copy(inner)
    part.layers = list(layers)
    if not norm:
        part.norm = nn.Identity()
    return part


class LayerByLayer:
    """Runs an inner model one layer at a time, from hidden states to hidden states."""

    def __init__(self, model: nn.Module) -> None:
        self._inner = model.model
        self._held: mx.array | None = None

    def _given(self, hidden: mx.array) -> mx.array:
        assert self._held is not None, "a layer begins with its hidden states"
        return self._held

    def embed(self, ids: mx.array) -> mx.array:
        """Return what the first layer gets for ids (B, T)."""
        layers = [passing(layer, unchanged) for layer in self._inner.layers]
        hidden: mx.array = with_layers(self._inner, layers, norm=False)(ids)
        return hidden

    def layer(self, index: int, ids: mx.array, hidden: mx.array) -> mx.array:
        """Return the output of layer `index` for ids (B, T) and its input (B, T, hidden)."""
        layers = [
            layer
            if number == index
            else passing(layer, self._given if number < index else unchanged)
            for number, layer in enumerate(self._inner.layers)
        ]
        if index == 0:
            result: mx.array = with_layers(self._inner, layers, norm=False)(ids)
            return result
        return self._run(layers, ids, hidden, norm=False)

    def norm(self, ids: mx.array, hidden: mx.array) -> mx.array:
        """Return the last layer's output (B, T, hidden) after the last norm."""
        layers = [passing(layer, self._given) for layer in self._inner.layers]
        return self._run(layers, ids, hidden, norm=True)

    def _run(
        self, layers: Sequence[nn.Module], ids: mx.array, hidden: mx.array, *, norm: bool
    ) -> mx.array:
        self._held = hidden
        result: mx.array = with_layers(self._inner, layers, norm=norm)(ids)
        self._held = None
        return result
