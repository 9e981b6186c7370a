"""Find common prompt prefixes, so that each is computed once.

A system prompt and tools before many questions are most of what a model has to read.
Does not: compute anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What a start must save, in tokens that need not be read: computing one takes a pass through all
# weights, however few tokens it has, which is about what this many more cost in a batch.
MIN_SAVED_TOKENS = 64


@dataclass(frozen=True)
class Start:
    """Tokens that several prompts begin with.

    parent: the number of the start that these tokens begin with, or None.
    """

    ids: tuple[int, ...]
    parent: int | None


def shared_starts(
    prompts: Sequence[Sequence[int]],
) -> tuple[tuple[Start, ...], tuple[int | None, ...]]:
    """Return the starts worth computing once, parents first, and the number of each prompt's own.

    A start always leaves out its prompts' last token, from which an answer begins.
    """
    starts: list[Start] = []
    own: list[int | None] = [None] * len(prompts)

    def share(members: list[int], parent: int | None) -> None:
        shortest = min(len(prompts[member]) for member in members) - 1
        # They are in order, so what the first and the last share is shared by all.
        first, last = prompts[members[0]], prompts[members[-1]]
        length = min(_common(first, last), shortest)
        known = 0 if parent is None else len(starts[parent].ids)
        if (len(members) - 1) * (length - known) >= MIN_SAVED_TOKENS:
            starts.append(Start(tuple(first[:length]), parent))
            parent = len(starts) - 1
            for member in members:
                own[member] = parent
        groups: dict[int, list[int]] = {}
        for member in members:
            groups.setdefault(prompts[member][length], []).append(member)
        for group in groups.values():
            if 1 < len(group) < len(members):
                share(group, parent)

    if prompts:
        share(sorted(range(len(prompts)), key=lambda index: tuple(prompts[index])), None)
    return tuple(starts), tuple(own)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two prompts begin with alike."""
    pairs = zip(one, other, strict=False)
    unequal = (index for index, (a, b) in enumerate(pairs) if a != b)
    return next(unequal, min(len(one), len(other)))
