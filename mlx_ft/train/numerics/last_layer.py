"""Last layer computed only at trained positions.

Does: within a context, compute the last layer's queries, attention output and feed-forward part at
chosen positions alone. Does not: prove that a model allows it; the caller does, on a real row.

The last layer's output at a position goes into that position's logits and nowhere else. Without a
trained token there, only its keys and values are used, by later positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ft.train.numerics.custom_vjp import put, take

# Parts of a layer, by mlx-lm's names, that treat each position by itself and that no other position
# depends on. A layer without one of them does without it.
PARTS = (("self_attn", "q_proj"), ("self_attn", "o_proj"), ("mlp",))
CHOSEN = "_chosen_positions"
# Beyond this share of positions there is little to skip, and gather and scatter cost time too.
MOST_CHOSEN = 0.9


def worthwhile(positions: mx.array | None, tokens: int) -> bool:
    """Return whether to compute `positions` apart, of so many tokens."""
    return positions is not None and 0 < positions.size <= MOST_CHOSEN * tokens


def parts_of(layer: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return (holder, name, part) of each part of a layer that can be skipped at a position."""
    found = []
    for *path, name in PARTS:
        holder = layer
        for step in path:
            holder = holder.get(step, {})
        part = holder.get(name)
        if isinstance(part, nn.Module):
            found.append((holder, name, part))
    return found


@contextmanager
def only_at(layer: nn.Module, positions: mx.array | None) -> Iterator[None]:
    """Within, `layer` is right at `positions` (N) of its flattened (B, T).

    It is anything finite elsewhere. It is right everywhere if `positions` is None.
    Parameters keep their names.
    """
    if positions is None:
        yield
        return
    # Within a layer that is computed twice the stand-ins are in place already.
    parts = [found for found in parts_of(layer) if CHOSEN not in vars(found[-1])]
    for holder, name, part in parts:
        holder[name] = _at(part, positions)
    try:
        yield
    finally:
        for holder, name, part in parts:
            holder[name] = part


def _at(part: nn.Module, positions: mx.array) -> nn.Module:
    """Return a stand-in with the same parameters that computes `positions` alone."""
    twin = copy.copy(part)
    vars(twin)[CHOSEN] = positions
    original: Any = type(part)
    twin.__class__ = _at_positions(original)
    return twin


@cache
def _at_positions(original: Any) -> Any:
    """Return a subclass that computes like `original`, at its chosen positions alone."""

    def call(self: nn.Module, hidden: mx.array) -> mx.array:
        positions = vars(self)[CHOSEN]
        flat = hidden.reshape(-1, hidden.shape[-1])
        outputs: mx.array = original.__call__(self, take(flat, positions)[None]).squeeze(0)
        everywhere = put(outputs, positions, flat.shape[0])
        return everywhere.reshape(*hidden.shape[:-1], -1)

    members: dict[str, Any] = {"__call__": call}
    return type(f"Chosen{original.__name__}", (original,), members)
