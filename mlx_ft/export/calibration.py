"""Input statistics of linear layers: sums of products of their inputs over calibration rows.

Does: pad rows into batches; watch layers without changing their outputs.
Does not: choose the rows, or quantize (`gptq.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_ft.data.tokens import group_rows, pad_rows
from mlx_ft.engine.partial_model import activations_in_float32

Layers = Mapping[str, nn.Linear | nn.Embedding]
# Padded tokens that go through the model together; their products are summed at once.
BATCH_TOKENS = 1024


@dataclass
class InputStatistics:
    """Sums of products of the inputs seen so far.

    products: layer -> sum of products (inputs, inputs). owner: layer -> the layer that holds its
    products; layers fed by one array share them. last: the last input array and its layer.
    positions: tokens of the flattened batch that are not padding.
    """

    products: dict[str, mx.array] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    last: tuple[mx.array, str] | None = None
    positions: mx.array | None = None

    def begin(self, positions: mx.array) -> None:
        """Begin a batch with these positions."""
        self.last, self.positions = None, positions

    def see(self, name: str, inputs: mx.array) -> None:
        """Add the inputs of a layer."""
        if self.last is not None and self.last[0] is inputs:
            self.owner[name] = self.last[1]
            return
        self.last = (inputs, name)
        self.owner[name] = name
        tokens = inputs.reshape(-1, inputs.shape[-1])[self.positions].astype(mx.float32)
        product = tokens.T @ tokens
        held = self.products.get(name)
        self.products[name] = product if held is None else held + product


class _Watched(nn.Module):  # type: ignore[misc]  # mlx.nn has no type information
    """Stand-in for a linear layer or an embedding that records its inputs."""

    def __init__(self, layer: nn.Linear | nn.Embedding, name: str, seen: InputStatistics) -> None:
        super().__init__()
        self._layer, self._name, self._seen = layer, name, seen

    def __call__(self, inputs: mx.array) -> mx.array:
        if isinstance(self._layer, nn.Linear):
            self._seen.see(self._name, inputs)
        outputs: mx.array = self._layer(inputs)
        return outputs

    def as_linear(self, inputs: mx.array) -> mx.array:
        """Return the logits of an embedding that is also the vocabulary head."""
        self._seen.see(self._name, inputs)
        logits: mx.array = self._layer.as_linear(inputs)
        return logits


@dataclass(frozen=True)
class Batch:
    """Padded rows (B, T), and the flat positions within (B x T) that are not padding."""

    ids: mx.array
    positions: mx.array


def calibration_batches(rows: Sequence[Sequence[int]]) -> list[Batch]:
    """Return rows (token ids) as padded batches of about BATCH_TOKENS tokens."""
    batches = []
    for group in group_rows(list(map(len, rows)), BATCH_TOKENS):
        batch = [rows[index] for index in group]
        padded = pad_rows(batch)
        width = padded.shape[1]
        real = [i * width + place for i, row in enumerate(batch) for place in range(len(row))]
        batches.append(Batch(mx.array(padded), mx.array(real)))
    return batches


@contextmanager
def watching(
    model: nn.Module, layers: Layers, into: InputStatistics | None = None
) -> Iterator[InputStatistics]:
    """Yield the statistics of the inputs of `layers`, collected while the context is open.

    into: where they are collected (None: a new InputStatistics).
    """
    seen = InputStatistics() if into is None else into
    watched = [(name, _Watched(layer, name, seen)) for name, layer in layers.items()]
    model.update_modules(tree_unflatten(watched))
    try:
        yield seen
    finally:
        model.update_modules(tree_unflatten(list(layers.items())))


def input_statistics(
    model: nn.Module, layers: Layers, rows: Sequence[Sequence[int]]
) -> InputStatistics:
    """Run the rows through the model and return the input statistics of `layers`.

    Activations are float32 on every device: a sum of products has no use for rounding on the way.
    """
    with watching(model, layers) as seen, activations_in_float32(model):
        for batch in calibration_batches(rows):
            seen.begin(batch.positions)
            mx.eval(model(batch.ids), seen.products)
    return seen
