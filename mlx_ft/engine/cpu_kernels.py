"""Fast exp, gates and attention for x86 CPUs.

MLX's exp takes 12 to 28 ns an element there, one element at a time; additions and multiplications
take 0.6 ns. Over a vocabulary, or in every gate of every layer, that is a large share of a step.
Everywhere else (on Metal above all) MLX's own functions are used.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, base, switch_layers

from mlx_ft.engine.device import on_cpu

# Raised when the functions here give other bits: stored outputs of frozen layers depend on them.
CPU_MATH_VERSION = 2
LOG2_E = 1.4426950408889634
# What is smaller is as good as nothing beside 1, where float32 resolves 2 ** -24; and its products
# stay clear of denormal numbers, which processors are slow with.
SMALLEST_EXPONENT = -64.0
# 2 ** f for f in [-0.5, 0.5], highest power first: least squares of the relative error at 2,001
# Chebyshev points, at most 1.2e-7 off; float32 itself resolves 6e-8.
POWERS = (
    1.326697992383205e-3,
    9.675469395324987e-3,
    5.550742675409218e-2,
    2.4022121576229327e-1,
    6.931469490692199e-1,
    1.0000000710651666,
)
FLOAT32_MANTISSA_BITS = 23
# Added to a float32 below 2 ** 22, it leaves no bits for a fraction (Goldberg 1991, on rounding).
TO_WHOLE = float(3 << 22)
# A quarter of a MiB: a chain of fifteen operations is then not bound by the memory.
PART_ELEMENTS = 1 << 16
FORBIDDEN = -1e30
# Queries that are computed together under a causal mask.
BLOCK_QUERIES = 128


def exp_is_slow() -> bool:
    """Return whether MLX computes on an x86 CPU here."""
    return on_cpu() and platform.machine() in ("x86_64", "AMD64")


def exp_of_differences(values: mx.array) -> mx.array:
    """Return exp(values) of float32 values that are zero or less, within 2e-6 of the result.

    No gradient passes through the polynomial. Results below 2 ** -64 become 2 ** -64.
    """
    return exp_by_polynomial(values) if exp_is_slow() else mx.exp(values)


def _in_parts(function: Callable[[mx.array], mx.array], values: mx.array) -> mx.array:
    """Return a function of each element, for a few elements at a time that stay in the cache."""
    if values.size <= PART_ELEMENTS:
        return function(values)
    flat = values.reshape(-1)
    starts = range(0, flat.size, PART_ELEMENTS)
    parts = [function(flat[start : start + PART_ELEMENTS]) for start in starts]
    return mx.concatenate(parts).reshape(values.shape)


def exp_by_polynomial(values: mx.array) -> mx.array:
    """Return exp of float32 values <= 0, within 2e-6 of the result."""
    return _in_parts(_exp, values)


def _exp(values: mx.array) -> mx.array:
    return _two_to_the(values * LOG2_E)


def two_to_the(values: mx.array) -> mx.array:
    """Return 2 ** values of float32 values <= 0, within 2e-6 of the result."""
    return _in_parts(_two_to_the, values)


def _two_to_the(values: mx.array) -> mx.array:
    return _power_of_two(mx.maximum(values, SMALLEST_EXPONENT))


def _power_of_two(exponent: mx.array) -> mx.array:
    """Return 2 ** n * 2 ** f for exponents n + f of -64 to 64.

    The whole number n goes into the exponent bits of the float 2 ** f.
    """
    shifted = exponent + TO_WHOLE  # rounds, and leaves n in the lowest bits
    fraction = exponent - (shifted - TO_WHOLE)
    power = POWERS[0] * fraction + POWERS[1]
    for coefficient in POWERS[2:]:
        power = power * fraction + coefficient
    whole = mx.left_shift(mx.view(shifted, mx.int32), FLOAT32_MANTISSA_BITS)
    result: mx.array = mx.view(mx.view(power, mx.int32) + whole, mx.float32)
    return result


def sigmoid_by_polynomial(values: mx.array) -> mx.array:
    """Return the logistic function of float32 values of either sign; no gradient passes."""
    return _in_parts(_sigmoid, values)


def _sigmoid(values: mx.array) -> mx.array:
    exponent = mx.maximum(values * -LOG2_E, SMALLEST_EXPONENT)
    power = _power_of_two(mx.minimum(exponent, -SMALLEST_EXPONENT))
    result: mx.array = 1.0 / (1.0 + power)
    return result


@mx.custom_function
def _gate_and_sigmoid(gate: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = sigmoid_by_polynomial(gate)
    return gate * sigmoid * values, sigmoid


@_gate_and_sigmoid.vjp
def _gradients(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
    (gate, values), slope, sigmoid = primals, cotangents[0], outputs[1]
    weighted = slope * sigmoid
    return weighted * values * (1.0 + gate * (1.0 - sigmoid)), weighted * gate


def swiglu(gate: mx.array, values: mx.array) -> mx.array:
    """Return silu(gate) * values, as mlx_lm.models.activations.swiglu, gradients included."""
    if gate.dtype != mx.float32:
        plain: mx.array = activations.swiglu(gate, values)
        return plain
    result: Any = _gate_and_sigmoid(gate, values)
    gated: mx.array = result[0]
    return gated


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Return what mlx_lm.models.base.scaled_dot_product_attention returns, gradients included.

    queries (B, heads, T, width), keys and values (B, groups, S, width); the last query sees all.
    """
    if queries.dtype != mx.float32 or sinks is not None or hasattr(cache, "bits"):
        theirs: mx.array = base.scaled_dot_product_attention(
            queries, keys, values, cache, scale, mask, sinks
        )
        return theirs
    batch, heads, tokens, width = queries.shape
    grouped = queries.reshape(batch, keys.shape[1], heads // keys.shape[1], tokens, width)
    blocks = [
        _attend_block(
            grouped[..., first:end, :],
            keys[:, :, :seen],
            values[:, :, :seen],
            scale,
            _added(mask, grouped.shape, keys.shape[2], first, end)[..., :seen],
        )
        for first, end, seen in _query_blocks(tokens, keys.shape[2], mask)
    ]
    outputs = mx.concatenate(blocks, axis=3) if len(blocks) > 1 else blocks[0]
    return outputs.reshape(batch, heads, tokens, values.shape[-1])


def _query_blocks(
    tokens: int, seen: int, mask: mx.array | str | None
) -> list[tuple[int, int, int]]:
    """Return (first, end, keys that any of them sees) of neighbouring queries.

    Under a causal mask only a few are together, so that little is computed for the mask to forbid.
    """
    if not isinstance(mask, str):
        return [(0, tokens, seen)]
    assert mask == "causal", mask
    ends = [*range(BLOCK_QUERIES, tokens, BLOCK_QUERIES), tokens]
    return [(first, end, seen - tokens + end) for first, end in zip([0, *ends], ends, strict=False)]


def _attend_block(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, added: mx.array
) -> mx.array:
    """Return attention of queries (B, groups, heads a group, t, width) to keys and values (B,
    groups, n, width), with `added` to the scores.

    The exponentials are kept for the gradient. They are never divided by their sums, since the much
    smaller outputs can be. FlashAttention does so too (Dao et al., arXiv 2205.14135, section 3.1
    and appendix B.2); its tiles are not used here.
    """
    *outer, heads, tokens, width = queries.shape
    together = (*outer, heads * tokens)

    @mx.custom_function
    def attend(
        queries: mx.array, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        asked = (queries * (scale * LOG2_E)).reshape(*together, width)
        scores = (asked @ keys.swapaxes(-1, -2)).reshape(*outer, heads, tokens, -1) + added
        powers = two_to_the(scores - mx.max(scores, axis=-1, keepdims=True))
        powers = powers.reshape(*together, -1)
        total = mx.sum(powers, axis=-1, keepdims=True)
        return (powers @ values) / total, powers, total

    @attend.vjp
    def gradients(
        primals: Any, cotangents: Any, outputs: Any
    ) -> tuple[mx.array, mx.array, mx.array]:
        queries, keys, values = primals
        output, powers, total = outputs
        slope = cotangents[0] / total
        along = mx.sum(slope * output, axis=-1, keepdims=True)
        of_scores = powers * (slope @ values.swapaxes(-1, -2) - along)
        asked = (queries * scale).reshape(*together, width)
        return (
            (of_scores @ (keys * scale)).reshape(queries.shape),
            of_scores.swapaxes(-1, -2) @ asked,
            powers.swapaxes(-1, -2) @ slope,
        )

    result: Any = attend(queries, keys, values)
    output: mx.array = result[0].reshape(*outer, heads, tokens, values.shape[-1])
    return output


def _added(
    mask: mx.array | str | None, queries: tuple[int, ...], seen: int, first: int, end: int
) -> mx.array:
    """Return the mask's addition to the scores of queries `first` to `end`.

    It is broadcastable to (B, groups, heads a group, t, S), and far below all others where
    forbidden.
    Adding costs a tenth of choosing (`where`, 5 ns an element here).
    """
    tokens = queries[3]
    if mask is None:
        return mx.zeros((1, seen))
    if isinstance(mask, str):
        before = seen - tokens
        mask = mx.arange(before + first, before + end)[:, None] >= mx.arange(seen)[None]
    elif mask.ndim == 4:  # (B, heads or 1, T, S)
        if mask.shape[1] == 1:
            mask = mask[:, :, None]
        else:
            mask = mask.reshape(mask.shape[0], *queries[1:3], *mask.shape[2:])
    if mask.dtype == mx.bool_:
        return mx.where(mask, 0.0, FORBIDDEN)
    return mask * LOG2_E


REPLACED: Mapping[str, tuple[Any, Any]] = {
    "swiglu": (activations.swiglu, swiglu),
    "scaled_dot_product_attention": (base.scaled_dot_product_attention, attention),
}


@contextmanager
def fast_math(model: nn.Module) -> Iterator[None]:
    """While it lasts, mlx-lm's code of this model calls the functions from here, where that is
    faster.

    They are found by their names in the module of the model's class, so they are put there.
    """
    places = [vars(sys.modules[type(model).__module__]), vars(switch_layers)]
    found = [
        (place, name)
        for place in places
        for name, (theirs, _) in REPLACED.items()
        if exp_is_slow() and place.get(name) is theirs
    ]
    for place, name in found:
        place[name] = REPLACED[name][1]
    try:
        yield
    finally:
        for place, name in found:
            place[name] = REPLACED[name][0]
