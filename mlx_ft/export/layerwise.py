"""Run a model one layer at a time, so that only one layer's weights are in memory.

Does: run rows through embedding, layers, norm and head in turn; look up tokens and compute logits a
few rows of the vocabulary at a time; prove on a real row that the outputs are those of the whole
model. Does not: read or compute weights.
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
from mlx_ft.system.console import Progress
from mlx_ft.system.gpu_errors import device_failure

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
# Vocabulary entries on which heads of two sizes must agree.
PROOF_WORDS = 64

# token ids, or (first row, end row), of a weight -> these rows
Chosen = Callable[[Sequence[int]], mx.array]
Rows = Callable[[int, int], mx.array]


class LookedUp(nn.Module):  # type: ignore[misc]  # mlx.nn has no type information
    """Stand-in for an embedding that gets only the rows of the tokens it looks up."""

    def __init__(self, chosen: Chosen) -> None:
        super().__init__()
        self._chosen = chosen

    def __call__(self, ids: mx.array) -> mx.array:
        tokens, places = np.unique(np.array(ids), return_inverse=True)
        rows = self._chosen([int(token) for token in tokens])
        return rows[mx.array(places.reshape(ids.shape))]


class _Unread(nn.Module):  # type: ignore[misc]  # mlx.nn has no type information
    """Stand-in for the embedding of a part that is given its states: zeros of a lookup's shape."""

    def __init__(self, like: mx.array) -> None:
        super().__init__()
        self._width, self._dtype = like.shape[-1], like.dtype

    def __call__(self, ids: mx.array) -> mx.array:
        return mx.broadcast_to(mx.zeros((1,), self._dtype), (*ids.shape, self._width))


def fits_layers(model: nn.Module) -> bool:
    """Return whether a model is built as embedding, layers, norm and head."""
    inner = getattr(model, "model", None)
    return inner is not None and all(part in inner for part in ("embed_tokens", "layers", "norm"))


def is_in_layers(name: str) -> bool:
    """Return whether a weight or module belongs to one of the layers."""
    return name.startswith("model.layers.")


def layer_prefix(index: int) -> str:
    """Return how the names of a layer's weights begin."""
    return f"model.layers.{index}."


@dataclass(frozen=True)
class LayerwiseModel:
    """A model of which one layer at a time has its weights in memory.

    model: its structure. vocabulary: rows of its head. chosen: rows of the embedding by token id.
    head_rows, head_bias: rows of the head's weight and bias. load, unload: put a layer's weights in
    place, and drop them again.
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

        Only the first looks up tokens: mlx-lm's models do so in every call, and a part is a call.
        """
        inner = self.model.model
        inner.embed_tokens = LookedUp(self.chosen)
        first = Part(inner, 0, inner.layers[:1], norm=False)
        inner.embed_tokens = _Unread(self.chosen([0]))
        others = [Part(inner, at, [inner.layers[at]], norm=False) for at in range(1, self.layers)]
        return [first, *others], Part(inner, self.layers, [], norm=True)

    def states(
        self, batches: Sequence[mx.array], progress: Progress | None = None
    ) -> list[mx.array]:
        """Return the final states (B, T, hidden) of padded rows of ids (B, T), normed.

        Reports to `progress` after each layer: done is the number of layers.
        """
        parts, norm = self.one_by_one()
        states: list[mx.array | None] = [None] * len(batches)
        for index, part in enumerate(parts):
            self.load(index)
            # One list for all layers: a layer's inputs are freed as its outputs replace them.
            for place, ids in enumerate(batches):
                states[place] = _evaluated(part(ids, states[place]))
            self.unload(index)
            if progress is not None:
                progress.update(index + 1)
        return [_evaluated(norm(ids, state)) for ids, state in zip(batches, states, strict=True)]

    def logits(self, states: mx.array, first: int, end: int) -> mx.array:
        """Return the logits (N, end - first) of vocabulary entries for final states (N, hidden)."""
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


def layerwise_difference(
    layerwise: LayerwiseModel, whole: LayerwiseModel, row: Sequence[int]
) -> str | None:
    """Return why a model cannot run layer by layer, or None when it can.

    It can when its states on a row equal those of one call, and heads of two sizes agree. The call
    is made on `whole`, a second LayerwiseModel of the same model. In that call, too, each layer has
    its weights only while it computes.
    """
    name = type(layerwise.model).__module__.rsplit(".", 1)[-1]
    ids = mx.array([list(row)])
    try:
        (state,) = layerwise.states([ids])
        inner = whole.model.model
        inner.embed_tokens = LookedUp(whole.chosen)
        inner.layers = [_loaded_when_called(whole, index) for index in range(whole.layers)]
        plain = inner(ids)
        few = state[0, -2:]
        parts = [
            layerwise.logits(few, 0, PROOF_WORDS),
            layerwise.logits(few, PROOF_WORDS, 2 * PROOF_WORDS),
        ]
        apart = relative_difference(
            mx.concatenate(parts, axis=1), layerwise.logits(few, 0, 2 * PROOF_WORDS)
        )
        difference = max(relative_difference(state, plain), apart)
    except Exception as error:  # any model's code, called in a way its author did not plan
        if device_failure(error):
            raise
        return f"{name} does not take it ({error})"
    if not difference <= EQUAL_TOLERANCE:
        return f"{name} differs by {difference:.1e} (limit {EQUAL_TOLERANCE:.0e})"
    return None


def _loaded_when_called(layerwise: LayerwiseModel, index: int) -> nn.Module:
    """Return a stand-in for a layer that has its weights only while it computes.

    It has the layer's class and attributes.
    """
    layer = layerwise.model.model.layers[index]
    original = type(layer)

    def call(here: nn.Module, *arguments: Any, **named: Any) -> Any:
        layerwise.load(index)
        outputs = original.__call__(here, *arguments, **named)
        mx.eval(outputs)
        layerwise.unload(index)
        return outputs

    twin = copy.copy(layer)
    twin.__class__ = type(f"Loading{original.__name__}", (original,), {"__call__": call})
    return twin
