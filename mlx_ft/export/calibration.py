"""What goes into a model's linear layers when rows run through it: sums of products of inputs.

Does: pad rows into batches; watch layers without changing what they compute. Does not: choose the
rows, or quantize anything (`gptq.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_ft.data.tokens import group_rows, pad_rows

Layers = Mapping[str, nn.Linear | nn.Embedding]
# Padded tokens that go through the model together: their products are added up in one go.
BATCH_TOKENS = 1024


@dataclass
class Inputs:
    """What was seen so far: layers fed by one array share its products (inputs, inputs).

    `positions` are those tokens of the flattened batch that are no padding.
    """

    products: dict[str, mx.array] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    last: tuple[mx.array, str] | None = None
    positions: mx.array | None = None

    def begin(self, positions: mx.array) -> None:
        """Begin a batch with these positions."""
        self.last, self.positions = None, positions

    def see(self, name: str, inputs: mx.array) -> None:
        """Add what goes into a layer."""
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
    """Stands in for a linear layer, or an embedding, while its inputs are wanted."""

    def __init__(self, layer: nn.Linear | nn.Embedding, name: str, seen: Inputs) -> None:
        super().__init__()
        self._layer, self._name, self._seen = layer, name, seen

    def __call__(self, inputs: mx.array) -> mx.array:
        if isinstance(self._layer, nn.Linear):
            self._seen.see(self._name, inputs)
        outputs: mx.array = self._layer(inputs)
        return outputs

    def as_linear(self, inputs: mx.array) -> mx.array:
        """Give the logits of an embedding that is the vocabulary head too."""
        self._seen.see(self._name, inputs)
        logits: mx.array = self._layer.as_linear(inputs)
        return logits


@dataclass(frozen=True)
class Batch:
    """Padded rows (B, T), and the flat positions within (B x T) that are no padding."""

    ids: mx.array
    positions: mx.array


def calibration_batches(rows: Sequence[Sequence[int]]) -> list[Batch]:
    batches = []
    for group in group_rows(list(map(len, rows)), BATCH_TOKENS):
        batch = [rows[index] for index in group]
        padded = pad_rows(batch)
        width = padded.shape[1]
        real = [i * width + place for i, row in enumerate(batch) for place in range(len(row))]
        batches.append(Batch(mx.array(padded), mx.array(real)))
    return batches


@contextmanager
def watching(model: nn.Module, layers: Layers, into: Inputs | None = None) -> Iterator[Inputs]:
    """Yield the products of what goes into `layers`, or whatever `into` makes of it, meanwhile."""
    seen = Inputs() if into is None else into
    watched = [(name, _Watched(layer, name, seen)) for name, layer in layers.items()]
    model.update_modules(tree_unflatten(watched))
    try:
        yield seen
    finally:
        model.update_modules(tree_unflatten(list(layers.items())))


def see_inputs(model: nn.Module, layers: Layers, rows: Sequence[Sequence[int]]) -> Inputs:
    """Run the rows through the model and return the products of what went into `layers`."""
    with watching(model, layers) as seen:
        for batch in calibration_batches(rows):
            seen.begin(batch.positions)
            mx.eval(model(batch.ids), seen.products)
    return seen
