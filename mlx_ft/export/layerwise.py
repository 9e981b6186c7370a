"""A model taken one layer at a time: what comes before its layers, each layer, norm and head.

Does: run rows through layers that are there one after the other; look tokens up, and compute
logits, a few rows of the vocabulary at a time; prove on a real row that this gives what the model
gives as a whole. Does not: read or compute weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ft.engine.cpu_kernels import fast_math
from mlx_ft.engine.partial_model import EQUAL_TOLERANCE, Given, Part, relative_difference

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
# Words of the vocabulary on which heads of two sizes must agree.
PROOF_WORDS = 64

# ids of tokens, or (first row, end row), of a weight -> these rows
Chosen = Callable[[Sequence[int]], mx.array]
Rows = Callable[[int, int], mx.array]


class LookedUp(nn.Module):  # type: ignore[misc]  # mlx.nn has no type information
    """Stands in for an embedding: has the rows of the tokens that it is asked for, and no other."""

    def __init__(self, chosen: Chosen) -> None:
        super().__init__()
        self._chosen = chosen

    def __call__(self, ids: mx.array) -> mx.array:
        tokens, places = np.unique(np.array(ids), return_inverse=True)
        rows = self._chosen([int(token) for token in tokens])
        return rows[mx.array(places.reshape(ids.shape))]


class _Unread(nn.Module):  # type: ignore[misc]  # mlx.nn has no type information
    """Stands in for the embedding of a part that is handed its states: the shape of a lookup."""

    def __init__(self, like: mx.array) -> None:
        super().__init__()
        self._width, self._dtype = like.shape[-1], like.dtype

    def __call__(self, ids: mx.array) -> mx.array:
        return mx.broadcast_to(mx.zeros((1,), self._dtype), (*ids.shape, self._width))


def fits_layers(model: nn.Module) -> bool:
    """Say whether a model is built as embedding, layers, norm and head."""
    inner = getattr(model, "model", None)
    return inner is not None and all(part in inner for part in ("embed_tokens", "layers", "norm"))


def is_in_layers(name: str) -> bool:
    """Say whether a weight or module belongs to one of the layers."""
    return name.startswith("model.layers.")


def layer_prefix(index: int) -> str:
    """Return how the names of a layer's weights begin."""
    return f"model.layers.{index}."


@dataclass(frozen=True)
class Lane:
    """A model with weights that are there when they are needed.

    `chosen` gives rows of its embedding, `head_rows` rows of what makes the logits, `head_bias`
    their biases; `load` puts a layer's weights in place, `unload` takes them away again.
    """

    model: nn.Module
    vocabulary: int
    chosen: Chosen
    head_rows: Rows
    head_bias: Rows | None
    load: Callable[[int], None]
    unload: Callable[[int], None]

    @property
    def layers(self) -> int:
        return len(self.model.model.layers)

    def one_by_one(self) -> tuple[list[Part], Part]:
        """Return each layer and the last norm; the first layer is given no states.

        It alone looks tokens up: mlx-lm's models do so in every call, and each part is a call.
        """
        inner = self.model.model
        inner.embed_tokens = LookedUp(self.chosen)
        first = Part(inner, 0, inner.layers[:1], norm=False)
        inner.embed_tokens = _Unread(self.chosen([0]))
        others = [Part(inner, at, [inner.layers[at]], norm=False) for at in range(1, self.layers)]
        return [first, *others], Part(inner, self.layers, [], norm=True)

    def states(
        self, batches: Sequence[mx.array], on_layer: Callable[[], None] = lambda: None
    ) -> list[mx.array]:
        """Return the final states (B, T, hidden) of padded rows of ids (B, T), normed."""
        parts, norm = self.one_by_one()
        states: list[mx.array | None] = [None] * len(batches)
        for index, part in enumerate(parts):
            self.load(index)
            # One list for all layers: what a layer was given is gone once it has given its own.
            for place, ids in enumerate(batches):
                states[place] = _evaluated(part(ids, states[place]))
            self.unload(index)
            on_layer()
        return [_evaluated(norm(ids, state)) for ids, state in zip(batches, states, strict=True)]

    def logits(self, states: mx.array, first: int, end: int) -> mx.array:
        """Return the logits (N, end - first) of some words for final states (N, hidden)."""
        rows = self.head_rows(first, end)
        head = copy.copy(self.model)
        head.model = Given()
        if HEAD in self.model:
            linear = nn.Linear(rows.shape[1], rows.shape[0], self.head_bias is not None)
            linear.weight = rows
            if self.head_bias is not None:
                linear.bias = self.head_bias(first, end)
            head.lm_head = linear
        else:
            head.model.embed_tokens = nn.Embedding(1, rows.shape[1])
            head.model.embed_tokens.weight = rows
        with fast_math(self.model):
            logits: mx.array = head(states[None])[0]
        return logits


def _evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array


def why_not_by_layers(lane: Lane, whole: Lane, row: Sequence[int]) -> str | None:
    """Return why a model cannot be taken layer by layer, or None where this gives on a row what
    the same model (`whole`, another lane of it) gives in one call, and heads of two sizes agree.

    In that call, too, each layer's weights are there only while it is computed.
    """
    name = type(lane.model).__module__.rsplit(".", 1)[-1]
    ids = mx.array([list(row)])
    try:
        (state,) = lane.states([ids])
        inner = whole.model.model
        inner.embed_tokens = LookedUp(whole.chosen)
        inner.layers = [_loaded_when_called(whole, index) for index in range(whole.layers)]
        plain = inner(ids)
        few = state[0, -2:]
        parts = [lane.logits(few, 0, PROOF_WORDS), lane.logits(few, PROOF_WORDS, 2 * PROOF_WORDS)]
        apart = relative_difference(
            mx.concatenate(parts, axis=1), lane.logits(few, 0, 2 * PROOF_WORDS)
        )
        difference = max(relative_difference(state, plain), apart)
    except Exception as error:  # any model's code, called in a way that its author did not plan
        return f"{name} does not take it ({error})"
    if not difference <= EQUAL_TOLERANCE:
        return f"{name} differs by {difference:.1e} (limit {EQUAL_TOLERANCE:.0e})"
    return None


def _loaded_when_called(lane: Lane, index: int) -> nn.Module:
    """Return a stand-in for a layer, of its class and with its attributes, that has its weights
    while it computes.
    """
    layer = lane.model.model.layers[index]
    original = type(layer)

    def call(here: nn.Module, *arguments: Any, **named: Any) -> Any:
        lane.load(index)
        outputs = original.__call__(here, *arguments, **named)
        mx.eval(outputs)
        lane.unload(index)
        return outputs

    twin = copy.copy(layer)
    twin.__class__ = type(f"Loading{original.__name__}", (original,), {"__call__": call})
    return twin
