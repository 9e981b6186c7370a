"""Pack rows into one sequence in a GPU's way: by places that are data, all rows at once.

A GPU is slow to begin a kernel. Here rotation is one kernel and attention another, whatever the
rows; the rows are padded for attention alone. Two batches of the same sizes have the same graph, so
that a compiled step serves both. Does not: prove that a model allows it (`forward.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ft.engine.device import on_cpu
from mlx_ft.train.numerics.buckets import OTHER_STEPS, TOKEN_STEPS, bucket
from mlx_ft.train.numerics.custom_vjp import with_gradient
from mlx_ft.train.numerics.packing import Attention, Packing, Rope, Span, mask_of


@dataclass(frozen=True, eq=False)
class PackedPlaces:
    """A packing of two rows or more as arrays, with T tokens in all, the last of them padding.

    shared: first tokens of all rows.
    positions: (T), of each token in its row.
    own: (rows, longest), behind the shared tokens: the place of each row's own tokens, then that of
        the padding.
    back: (T - shared): the flat place in `own` of each token; of padding, one that is padding.
    """

    shared: int
    positions: mx.array
    own: mx.array
    back: mx.array

    @property
    def rows(self) -> int:
        return int(self.own.shape[0])

    @property
    def tokens(self) -> int:
        """Length of the sequence, padding included."""
        return int(self.positions.size)

    @staticmethod
    def of(packing: Packing) -> PackedPlaces:
        """Return the places of a packing, whose sizes are of the few that are compiled."""
        shared = packing.shared
        longest = bucket(max(packing.own) + 1, OTHER_STEPS)
        tokens = max(bucket(packing.tokens + 1, TOKEN_STEPS), shared + longest)
        positions = np.zeros(tokens, np.int32)
        positions[:shared] = np.arange(shared)
        own = np.full((len(packing.own), longest), tokens - shared - 1, np.int32)
        back = np.full(tokens - shared, longest - 1, np.int32)
        for row, (start, count) in enumerate(zip(packing.starts, packing.own, strict=True)):
            first = start - shared
            positions[start : start + count] = shared + np.arange(count)
            own[row, :count] = first + np.arange(count)
            back[first : first + count] = row * longest + np.arange(count)
        return PackedPlaces(shared, mx.array(positions), mx.array(own), mx.array(back))

    @property
    def arrays(self) -> dict[str, mx.array]:
        """All that two packings of the same sizes differ in."""
        return {"places": self.positions, "own": self.own, "back": self.back}

    def with_arrays(self, arrays: Mapping[str, mx.array]) -> PackedPlaces:
        """Return a packing of these sizes with other `arrays`."""
        return PackedPlaces(self.shared, arrays["places"], arrays["own"], arrays["back"])

    def rotated(self, rope: Rope) -> Rope:
        return _rope_at_places(rope, self)

    def attended(self, attention: Attention) -> Attention:
        return _attention_at_places(attention, self)


def places_of(packing: Packing | None) -> PackedPlaces | None:
    """Return the places that a GPU packs rows by; None on a CPU, and for a single row."""
    if packing is None or len(packing.own) == 1 or on_cpu():
        return None
    return PackedPlaces.of(packing)


def at_the_end(array: mx.array, tokens: int) -> mx.array:
    """Return an array (1, T, ...) with zeros behind, up to so many tokens."""
    missing = tokens - array.shape[1]
    if missing == 0:
        return array
    return mx.concatenate([array, mx.zeros((1, missing, *array.shape[2:]), array.dtype)], axis=1)


def _rope_at_places(rope: Rope, places: PackedPlaces) -> Rope:
    def at_places(values: mx.array, *arguments: Any, offset: Any = 0, **named: Any) -> mx.array:
        if values.ndim != 4 or values.shape[0] != 1 or values.shape[-2] != places.tokens:
            return rope(values, *arguments, offset=offset, **named)
        # As a batch of single tokens, each with an offset of its own.
        tokens = values.swapaxes(0, 2)
        turned = rope(tokens, *arguments, offset=places.positions + offset, **named)
        return turned.swapaxes(0, 2)

    return at_places


def _attention_at_places(attention: Attention, places: PackedPlaces) -> Attention:
    shared, (rows, longest) = places.shared, places.own.shape

    def at_places(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if not queries.shape[-2] == keys.shape[-2] == places.tokens:
            return attention(queries, keys, values, cache, scale, mask, sinks=sinks)
        tokens: Sequence[mx.array] = [a.swapaxes(1, 2).squeeze(0) for a in (queries, keys, values)]
        outputs = []
        if shared:
            starts, tokens = zip(*(mx.split(a, [shared], axis=0) for a in tokens), strict=True)
            asked, known, told = (start[None].swapaxes(1, 2) for start in starts)
            part = mask_of(mask, Span(0, shared, 0))
            outputs.append(attention(asked, known, told, cache, scale, part, sinks=sinks))
        own_asked, own_known, own_told = (_heads_of_rows(a, places) for a in tokens)
        if shared:
            own_known, own_told = (
                mx.concatenate([mx.broadcast_to(a, (rows, *a.shape[1:])), later], axis=2)
                for a, later in ((known, own_known), (told, own_told))
            )
        part = mask_of(mask, Span(0, longest, shared))
        own = attention(own_asked, own_known, own_told, cache, scale, part, sinks=sinks)
        flat = own.swapaxes(1, 2).reshape(rows * longest, own.shape[1], own.shape[3])
        outputs.append(_packed_again(flat, places)[None].swapaxes(1, 2))
        return mx.concatenate(outputs, axis=2) if shared else outputs[0]

    return at_places


def _heads_of_rows(tokens: mx.array, places: PackedPlaces) -> mx.array:
    """Return values (T - shared, heads, width) of tokens by row (rows, heads, longest, width)."""
    apart = _rows_apart(tokens, places).reshape(*places.own.shape, *tokens.shape[1:])
    return apart.swapaxes(1, 2)


# Each is the other's gradient: what is at padding has no gradient, since it has no weight in the
# loss and later tokens of a row are not seen.


def _rows_apart(values: mx.array, places: PackedPlaces) -> mx.array:
    """Return the values (T - shared, ...) of tokens at the places of rows (rows x longest, ...)."""
    own, back = places.own.reshape(-1), places.back
    return with_gradient(lambda values: values[own], lambda _, slope: (slope[back],))(values)


def _packed_again(values: mx.array, places: PackedPlaces) -> mx.array:
    """Return the values (rows x longest, ...) of rows at their tokens (T - shared, ...)."""
    own, back = places.own.reshape(-1), places.back
    return with_gradient(lambda values: values[back], lambda _, slope: (slope[own],))(values)
