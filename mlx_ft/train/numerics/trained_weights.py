"""The trained weights as a step computes with them: one array each, or an adapter as one vector.

Does: read them from a model and put them back; compute with others; the same for an optimizer's
state. Does not: update them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_unflatten

from mlx_ft.train.numerics.flat_adapter import FlatAdapter

# They treat each number by itself, so that one long array is the same to them as many.
ELEMENTWISE = (optimizers.Adam, optimizers.SGD, optimizers.Lion)
VECTOR = "adapter"
OF_ALL = ("step", "learning_rate")


class TrainedWeights(Protocol):
    """Weights and optimizer state as trees of arrays, in the form that a step works with."""

    def read(self) -> Any:
        """Return the model's trained weights."""

    def computing(self, weights: Any) -> AbstractContextManager[None]:
        """Within, the model computes with these weights instead of its own."""

    def put(self, weights: Any) -> None:
        """Make them the model's own."""

    def read_state(self, optimizer: optimizers.Optimizer) -> Any:
        """Return the optimizer's state."""

    def put_state(self, optimizer: optimizers.Optimizer, state: Any) -> None:
        """Make it the optimizer's, by the names of the model's weights."""


class SeparateWeights:
    """One array for each weight, as the model has them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def read(self) -> Any:
        return self._model.trainable_parameters()

    @contextmanager
    def computing(self, weights: Any) -> Iterator[None]:
        own = self.read()
        self.put(weights)
        try:
            yield
        finally:
            self.put(own)

    def put(self, weights: Any) -> None:
        self._model.update(weights)

    def read_state(self, optimizer: optimizers.Optimizer) -> Any:
        return optimizer.state

    def put_state(self, optimizer: optimizers.Optimizer, state: Any) -> None:
        optimizer.state = state


class FlatWeights:
    """An adapter as one vector, of which the model's weights and the optimizer's state are views.

    dtype: type that the layers compute in.
    """

    def __init__(self, model: nn.Module, dtype: mx.Dtype, shares_inputs: bool) -> None:
        self._model = model
        self._dtype = dtype
        self._adapter = FlatAdapter(model, shares_inputs)
        self._weights = _Vector(self._adapter)
        self._states: dict[str, _Vector] = {}

    def read(self) -> Any:
        named = dict(tree_flatten(self._model.trainable_parameters()))
        return {VECTOR: self._weights.of(named)}

    def computing(self, weights: Any) -> AbstractContextManager[None]:
        return self._adapter.computing(weights[VECTOR], self._dtype)

    def put(self, weights: Any) -> None:
        views = self._weights.views_of(weights[VECTOR])
        self._model.update(tree_unflatten(list(views.items())))

    def read_state(self, optimizer: optimizers.Optimizer) -> Any:
        named = dict(tree_flatten(optimizer.state))
        of_kind: dict[str, dict[str, mx.array]] = {}
        for name, array in named.items():
            if name not in OF_ALL:
                weight, _, kind = name.rpartition(".")
                of_kind.setdefault(kind, {})[weight] = array
        vectors = {
            kind: self._states.setdefault(kind, _Vector(self._adapter)).of(arrays)
            for kind, arrays in of_kind.items()
        }
        whole = {name: named[name] for name in OF_ALL if name in named}
        return {**whole, VECTOR: vectors}

    def put_state(self, optimizer: optimizers.Optimizer, state: Any) -> None:
        named = [(name, state[name]) for name in OF_ALL if name in state]
        for kind, vector in state[VECTOR].items():
            views = self._states.setdefault(kind, _Vector(self._adapter)).views_of(vector)
            named += [(f"{weight}.{kind}", array) for weight, array in views.items()]
        optimizer.state = tree_unflatten(named)


class _Vector:
    """A vector and its views; given these very views back, it is found without a copy."""

    def __init__(self, adapter: FlatAdapter) -> None:
        self._adapter = adapter
        self._vector: mx.array | None = None
        self._views: Mapping[str, mx.array] = {}

    def of(self, named: Mapping[str, mx.array]) -> mx.array:
        """Return the vector of named arrays."""
        if self._vector is None or any(named[name] is not self._views[name] for name in named):
            self._vector = self._adapter.pack(named)
            self._views = dict(named)
        return self._vector

    def views_of(self, vector: mx.array) -> Mapping[str, mx.array]:
        """Return the views of a vector; of the last one, those that it had."""
        if vector is not self._vector:
            self._vector = vector
            self._views = self._adapter.unpack(vector)
        return self._views


def trained_weights(
    model: nn.Module,
    optimizer: optimizers.Optimizer,
    dtype: mx.Dtype | None,
    shares_inputs: bool,
) -> TrainedWeights:
    """Return the weights as one vector where that changes nothing, else one by one.

    dtype: type that the model computes in (None: not known, so that each layer finds out).
    shares_inputs: layers with one input may share a product.
    """
    if dtype is None or not isinstance(optimizer, ELEMENTWISE) or not FlatAdapter.fits(model):
        return SeparateWeights(model)
    return FlatWeights(model, dtype, shares_inputs)
