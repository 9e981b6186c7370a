"""Pack rows into one sequence, each attending only to itself, so that nothing is padded.

Does: lay rows out behind their common first tokens; within a context, make a model of mlx-lm count
positions and attend within each row, span by span. Does not: prove that a model allows it; the
caller does, on real rows. `packed_places.py` does the same in a GPU's way.

All other parts of a transformer's layer treat each token by itself. A packed sequence then gives
the same outputs as its rows one by one, in larger matrix products (Krell et al., arXiv 2107.02027,
section 3, without their fixed lengths).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_ft.data.tokens import Offsets

ATTENTION = "scaled_dot_product_attention"
Attention = Callable[..., mx.array]
Rope = Callable[..., mx.array]


class Layout(Protocol):
    """Rows in one sequence, and how a model's rotation and attention become those of the rows."""

    @property
    def rows(self) -> int:
        """Number of rows."""

    def rotated(self, rope: Rope) -> Rope:
        """Return MLX's rotation, by each token's position in its row."""

    def attended(self, attention: Attention) -> Attention:
        """Return mlx-lm's attention, within each row."""


@dataclass(frozen=True)
class Span:
    """Tokens `first` to `end` of the sequence; `position` is that of the first one in its row."""

    first: int
    end: int
    position: int


@dataclass(frozen=True)
class Packing:
    """Layout of packed rows: `shared` first tokens of all rows, then the `own` tokens of each."""

    shared: int
    own: tuple[int, ...]

    @property
    def rows(self) -> int:
        return len(self.own)

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.shared + sum(self.own)

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each row's own tokens begin."""
        return tuple(accumulate(self.own[:-1], initial=self.shared))

    @property
    def spans(self) -> tuple[Span, ...]:
        """Contiguous spans: the first row, then each other row's own tokens."""
        ends = (0, *accumulate(self.own[1:], initial=self.shared + self.own[0]))
        return tuple(
            Span(first, end, self.shared if index else 0)
            for index, (first, end) in enumerate(pairwise(ends))
        )

    def rotated(self, rope: Rope) -> Rope:
        return _rope_of_rows(rope, self)

    def attended(self, attention: Attention) -> Attention:
        return _attention_of_rows(attention, self)


def packed_groups(
    lengths: Offsets, rows: Sequence[int], shared: int, limit_tokens: int
) -> list[tuple[int, ...]]:
    """Return the rows in groups within a limit of packed tokens, by first-fit decreasing (Johnson
    1973).

    Sums do not depend on how rows are grouped, so this bounds memory and changes no result beyond
    float32 round-off. A row that is longer than the limit is a group of its own.
    """
    groups: list[list[int]] = []
    held: list[int] = []
    for row in sorted(rows, key=lambda row: (-int(lengths[row]), row)):
        own = int(lengths[row]) - shared
        fitting = (index for index, tokens in enumerate(held) if tokens + own <= limit_tokens)
        index = next(fitting, len(groups))
        if index == len(groups):
            groups.append([])
            held.append(shared)
        groups[index].append(row)
        held[index] += own
    return [tuple(sorted(group)) for group in groups]


@contextmanager
def packed(model: nn.Module, layout: Layout | None) -> Iterator[None]:
    """Within, `model` treats a sequence of packed rows as the rows one by one.

    Attention is found by its name in the modules of the model's classes, positions by the one
    function of MLX that rotates; a model that has others is not changed by this.
    """
    if layout is None or layout.rows == 1:
        yield
        return
    modules = {type(module).__module__ for module in model.modules()}
    places = [vars(sys.modules[name]) for name in modules if name in sys.modules]
    before = [(place, place[ATTENTION]) for place in places if ATTENTION in place]
    rope = mx.fast.rope
    for place, attention in before:
        place[ATTENTION] = layout.attended(attention)
    mx.fast.rope = layout.rotated(rope)
    try:
        yield
    finally:
        mx.fast.rope = rope
        for place, attention in before:
            place[ATTENTION] = attention


def _rope_of_rows(rope: Rope, packing: Packing) -> Rope:
    def of_rows(values: mx.array, *arguments: Any, offset: Any = 0, **named: Any) -> mx.array:
        if values.shape[-2] != packing.tokens:
            return rope(values, *arguments, offset=offset, **named)
        parts = [
            rope(of_span, *arguments, offset=offset + span.position, **named)
            for span, of_span in zip(packing.spans, _split(values, packing), strict=True)
        ]
        return mx.concatenate(parts, axis=-2)

    return of_rows


def _attention_of_rows(attention: Attention, packing: Packing) -> Attention:
    def of_rows(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if not queries.shape[-2] == keys.shape[-2] == packing.tokens:
            return attention(queries, keys, values, cache, scale, mask, sinks=sinks)
        seen = (_seen(array, packing) for array in (keys, values))
        spans = zip(packing.spans, _split(queries, packing), *seen, strict=True)
        parts = [
            attention(asked, known, told, cache, scale, mask_of(mask, span), sinks=sinks)
            for span, asked, known, told in spans
        ]
        return mx.concatenate(parts, axis=-2)

    return of_rows


def _split(array: mx.array, packing: Packing) -> list[mx.array]:
    """Return the spans of an array (..., T, width), by one split.

    Slices would each have a gradient of the array's whole size.
    """
    return list(mx.split(array, [span.end for span in packing.spans[:-1]], axis=-2))


def _seen(array: mx.array, packing: Packing) -> list[mx.array]:
    """Return the keys or values, of (B, groups, T, width), that queries of each span may see."""
    first, *others = _split(array, packing)
    if packing.shared == 0:
        return [first, *others]
    shared = first[..., : packing.shared, :]
    return [first, *(mx.concatenate([shared, own], axis=-2) for own in others)]


def mask_of(mask: mx.array | str | None, span: Span) -> mx.array | str | None:
    """Return the part of a mask for a span's positions: a mask depends on positions alone."""
    if mask is None or isinstance(mask, str):
        return mask
    end = span.position + span.end - span.first
    part: mx.array = mask[..., span.position : end, :end]
    return part
