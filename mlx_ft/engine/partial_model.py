"""Run some layers of a model as if they were all of it, with stand-ins for the others.

Code that depends on a layer's number, or runs before the first layer, stays as it is.
Does not: check that a model's code allows this. Callers prove it on real rows, with the measure
given here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_ft.engine.cpu_kernels import fast_math
from mlx_ft.engine.load import scalar

# Float32 round-off of a deep model, relative to the largest value; a wrong split is off by far
# more.
EQUAL_TOLERANCE = 2e-3
SIXTEEN_BITS = (mx.float16, mx.bfloat16)


def same_shape_tolerance(dtype: mx.Dtype) -> float:
    """Return how far two computations of the same shapes may be apart: a unit of the type's last
    place, for kernels that add up in another order each time; at least float32's round-off.
    """
    return max(EQUAL_TOLERANCE, float(mx.finfo(dtype).eps))


def standing_in(layer: nn.Module, kind: str, call: Callable[..., mx.array]) -> nn.Module:
    """Return a layer with the parameters and attributes of `layer`, called by `call`.

    It has a class of its own: other layers of the same class stay as they are.
    """
    twin = copy.copy(layer)
    original = type(layer)
    twin.__class__ = type(f"{kind}{original.__name__}", (original,), {"__call__": call})
    return twin


def passing(layer: nn.Module, output: Callable[[mx.array], mx.array]) -> nn.Module:
    """Return a stand-in for a layer that computes nothing: it gives `output` of its input.

    It keeps the layer's class and plain attributes, which a model may ask for, and no parameters.
    """

    def call(_: nn.Module, hidden: mx.array, *arguments: Any, **named: Any) -> mx.array:
        return output(hidden)

    twin = standing_in(layer, "Passing", call)
    twin.clear()
    return twin


def widening(layer: nn.Module) -> nn.Module:
    """Return a stand-in for a layer that computes in float32 where it is given 16 bits.

    MLX computes in the wider type of two, so all that follows is in float32 as well. Weights stay
    as they are stored.
    """

    def call(_: nn.Module, hidden: mx.array, *arguments: Any, **named: Any) -> mx.array:
        wide = hidden.astype(mx.float32) if hidden.dtype in SIXTEEN_BITS else hidden
        outputs: mx.array = layer(wide, *arguments, **named)
        return outputs

    return standing_in(layer, "Widening", call)


def looking_up_in_float32(embedding: nn.Module) -> nn.Module:
    """Return a stand-in for an embedding whose rows are float32: exactly the numbers it stores.

    A quantized embedding would round them to the type of its scales.
    """

    def call(_: nn.Module, ids: mx.array) -> mx.array:
        if "scales" not in embedding:
            plain: mx.array = embedding.weight[ids].astype(mx.float32)
            return plain
        biases = embedding.get("biases")
        scales = embedding.scales[ids]
        if mx.issubdtype(scales.dtype, mx.floating):  # else those of a mode without biases
            scales = scales.astype(mx.float32)
            biases = None if biases is None else biases[ids].astype(mx.float32)
        rows: mx.array = mx.dequantize(
            embedding.weight[ids],
            scales,
            biases,
            embedding.group_size,
            embedding.bits,
            embedding.mode,
        )
        return rows.astype(mx.float32)

    return standing_in(embedding, "Wide", call)


@contextmanager
def activations_in_float32(model: nn.Module) -> Iterator[None]:
    """Within, a model computes in float32 from its embeddings on.

    Weights stay as they are stored; beside them is a float32 copy of one weight at a time.
    """
    stored = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
    ]
    wide = [(name, looking_up_in_float32(module)) for name, module in stored]
    model.update_modules(tree_unflatten(wide))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(stored))


class Part:
    """Some neighbouring layers of an inner model (`embed_tokens`, `layers`, `norm`), with the last
    norm or without; every parameter is shared.

    Layers below hand over the hidden states that the part is given, layers above do nothing.
    """

    def __init__(
        self, inner: nn.Module, below: int, layers: Sequence[nn.Module], *, norm: bool
    ) -> None:
        self._held: mx.array | None = None
        above = inner.layers[below + len(layers) :]
        self.layer_count = len(inner.layers)
        self._first = below if layers else None
        self._inner = copy.copy(inner)
        self._inner.layers = [
            *(passing(layer, self._given) for layer in inner.layers[:below]),
            *layers,
            *(passing(layer, lambda hidden: hidden) for layer in above),
        ]
        if not norm:
            self._inner.norm = nn.Identity()

    def _given(self, hidden: mx.array) -> mx.array:
        assert self._held is not None, "layers above others begin with hidden states"
        return self._held

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Within, the part computes in float32, not in 16 bits, from its first layer on."""
        if self._first is None:
            yield
            return
        layers = self._inner.layers
        stored = layers[self._first]
        layers[self._first] = widening(stored)
        try:
            yield
        finally:
            layers[self._first] = stored

    def __call__(
        self,
        ids: mx.array,
        hidden: mx.array | None = None,
        caches: Sequence[Any] | None = None,
        within: Callable[[nn.Module], AbstractContextManager[None]] = nullcontext,
    ) -> mx.array:
        """Return the outputs (B, T, hidden) of the part, computed `within` a context of the inner
        model.

        ids: (B, T).
        hidden: the states below the part; a part that begins with the first layer needs none.
        """
        self._held = hidden
        with fast_math(self._inner), within(self._inner):
            outputs: mx.array = self._inner(ids, list(caches or [None] * self.layer_count))
        self._held = None
        return outputs


class Given(nn.Module):  # type: ignore[misc]  # mlx.nn has no type information
    """Stands in for a model's inner part when only its head is wanted: returns its input.

    With the inner part it has its embedding, which may be the head.
    """

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        if inner is not None and "embed_tokens" in inner:
            self.embed_tokens = inner.embed_tokens

    def __call__(self, inputs: mx.array, *arguments: Any, **named: Any) -> mx.array:
        return inputs


def relative_difference(ours: mx.array, plain: mx.array) -> float:
    """Return the largest difference over the largest plain value; infinite for other shapes."""
    if ours.shape != plain.shape:
        return float("inf")
    ours, plain = ours.astype(mx.float32), plain.astype(mx.float32)
    return scalar(mx.abs(ours - plain).max() / mx.maximum(mx.abs(plain).max(), 1e-6))
