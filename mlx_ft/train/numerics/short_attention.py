"""Attention in plain operations where MLX's fused training attention refuses on a GPU.

MLX 0.32.4 throws in the gradient of fused attention for at most 8 queries ("the vector kernels do
not produce a logsumexp") and with attention sinks ("NYI: attention sinks"). Rows behind each other,
unpadded, can be that short.
Does: within a context, compute these calls in matrix products. Does not: touch any other call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlx_ft.engine.device import on_cpu

MAX_VECTOR_QUERIES = 8


def plain_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Return scaled dot-product attention (B, heads, T, width), with a softmax in float32.

    queries: (B, heads, T, width). keys, values: (B, groups, S, width), heads a multiple of groups.
    mask: "causal", or boolean or additive, broadcast to (B, heads, T, S). sinks: (heads,).
    """
    batch, heads, tokens, width = queries.shape
    groups, seen = keys.shape[1:3]
    grouped = queries.reshape(batch, groups, heads // groups, tokens, width)
    scores = (grouped * scale) @ keys[:, :, None].swapaxes(-1, -2)
    scores = scores.reshape(batch, heads, tokens, seen).astype(mx.float32)
    if isinstance(mask, str):
        mask = mx.arange(seen) <= mx.arange(seen - tokens, seen)[:, None]
    if mask is not None:
        is_boolean = mask.dtype == mx.bool_
        scores = mx.where(mask, scores, -mx.inf) if is_boolean else scores + mask
    if sinks is not None:
        column = sinks.astype(mx.float32).reshape(1, heads, 1, 1)
        column = mx.broadcast_to(column, (batch, heads, tokens, 1))
        scores = mx.concatenate([scores, column], axis=-1)
    weights = mx.softmax(scores, axis=-1)[..., :seen].astype(values.dtype)
    weights = weights.reshape(batch, groups, heads // groups, tokens, seen)
    outputs = weights @ values[:, :, None]
    return outputs.reshape(batch, heads, tokens, values.shape[-1])


@contextmanager
def attention_with_gradient() -> Iterator[None]:
    """Within, on a GPU, attention that MLX has no fused gradient for is computed plainly."""
    if on_cpu():
        yield
        return
    place: Any = mx.fast
    fused = place.scaled_dot_product_attention

    def attention(
        queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, **named: Any
    ) -> mx.array:
        if queries.shape[-2] > MAX_VECTOR_QUERIES and named.get("sinks") is None:
            outputs: mx.array = fused(queries, keys, values, scale=scale, **named)
            return outputs
        known = {name: named[name] for name in ("mask", "sinks") if name in named}
        return plain_attention(queries, keys, values, scale=scale, **known)

    place.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        place.scaled_dot_product_attention = fused
