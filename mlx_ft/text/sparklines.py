"""Bars for the terminal: counts and curves on one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BARS = " ▁▂▃▄▅▆▇█"


def sparkline(counts: Sequence[int]) -> str:
    """Return counts as a row of bars of one line's height. Only 0 has no bar."""
    highest = max(counts, default=0) or 1
    return "".join(BARS[-(-count * (len(BARS) - 1) // highest)] for count in counts)


def trend(values: Sequence[float], width: int) -> str:
    """Return numbers as a row of at most `width` bars, the lowest as the smallest bar.

    Neighbours are averaged if there are more numbers than bars. Infinity and NaN are left out.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    count = min(width, len(finite))
    edges = [len(finite) * part // count for part in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    steps = len(BARS) - 2
    levels = [1 + round(steps * (mean - low) / (high - low or 1.0)) for mean in means]
    return "".join(BARS[level] for level in levels)
