"""Means with Wilson intervals that hold for a few dozen samples.

Does: intervals for pass rates and graded scores, and the summary of one column. Closed forms: no
randomness.
Does not: compare columns (`paired_stats.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from mlx_ft.evaluate.signs import SICK, SIGNS

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of `n` scores in [0, 1], and the ends of its confidence interval."""

    mean: float
    n: int
    low: float
    high: float


def wilson_interval(mean: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return (low, high) of Wilson's score interval for a proportion `mean` of `n` trials.

    `n` may be an effective sample size and need not be whole. Wilson 1927; recommended for small n
    by Brown, Cai and DasGupta 2001 (Statistical Science 16(2), 101-133).
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(
    scores: Sequence[float],
    weights: Sequence[float] | None = None,
    sources: Sequence[str | None] | None = None,
) -> Interval:
    """Return the (weighted) mean of scores in [0, 1] with its 95 % interval.

    Scores of 0 and 1 get Wilson's interval exactly. Graded scores get it with an effective sample
    size, n / (ratio of their variance to that of 0/1 scores of the same mean), as Franco, Little,
    Louis and Slud (2019, Journal of Survey Statistics and Methodology; PMC6690503) recommend where
    the variance of a share is not binomial. The ratio is taken with one score of 0 and one of 1
    added, our choice, so that equal scores do not make it nothing. Weights cost what Kish (1965)
    gives: n is (sum w)^2 / sum w^2. Simulated with scores of 0, 0.5 and 1 at n = 27, 100 and 400,
    it covers the true mean in 94 % of cases or more, but for the dips that Wilson's has, too. Not a
    bootstrap: that gives [1, 1] for 27 times 1.0.
    Samples that share a source (a passage, a user) cost what they repeat: n is divided by the ratio
    of the variance of the mean by sources to that by samples (Miller 2024, arXiv 2411.00640), never
    multiplied. A source of None is one of its own.
    """
    assert scores and all(0 <= score <= 1 for score in scores), "scores are from 0 to 1"
    weights = [1.0] * len(scores) if weights is None else weights
    assert len(weights) == len(scores) and all(weight > 0 for weight in weights)
    total = sum(weights)
    mean = sum(w * s for w, s in zip(weights, scores, strict=True)) / total
    mean = min(max(mean, 0.0), 1.0)
    kish_n = total**2 / sum(weight**2 for weight in weights)
    n = kish_n / _variance_ratio(scores) / _design_effect(scores, weights, sources)
    low, high = wilson_interval(mean, n)
    return Interval(mean, len(scores), min(low, mean), max(high, mean))


def _variance_ratio(scores: Sequence[float]) -> float:
    """Return the variance of scores, with 0 and 1 added, over that of 0/1 scores of their mean."""
    padded = [*scores, 0.0, 1.0]
    mean = sum(padded) / len(padded)
    variance = sum((score - mean) ** 2 for score in padded) / len(padded)
    return min(1.0, variance / (mean * (1 - mean)))


def _design_effect(
    scores: Sequence[float], weights: Sequence[float], sources: Sequence[str | None] | None
) -> float:
    """Return how many times as wide sources make the variance of the mean, at least 1.

    Where all scores are equal nothing shows how alike a source's samples are: they count as one.
    """
    groups: dict[object, list[int]] = {}
    for index, source in enumerate(sources or ()):
        groups.setdefault((index,) if source is None else source, []).append(index)
    if len(groups) in (0, len(scores)):
        return 1.0
    total = math.fsum(weights)
    mean = math.fsum(w * s for w, s in zip(weights, scores, strict=True)) / total
    moved = [w * (s - mean) for w, s in zip(weights, scores, strict=True)]
    apart = math.fsum(each**2 for each in moved)
    if apart < 1e-12 or len(groups) == 1:
        return len(scores) / len(groups)
    together = math.fsum(sum(moved[i] for i in group) ** 2 for group in groups.values())
    few = len(groups) / (len(groups) - 1) * (len(scores) - 1) / len(scores)
    return max(1.0, few * together / apart)


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the summary of one column as plain JSON.

    Each record has `score`, `category`, `failure` and `weight`, and may have `source` and `flags`.
    The result has:
    mean, n, low, high: of the scores (95 % interval).
    passed: how many scored exactly 1.
    by_category: category -> mean, n, low, high, in the order of the records.
    failures: kind -> count, most frequent first.
    degenerate: each of SIGNS, and `any` of the SICK ones -> count, rate, low and high.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["category"], []).append(row)
    failures = Counter(row["failure"] for row in rows if row["failure"] is not None)
    return {
        **_summary(rows),
        "passed": sum(row["score"] == 1 for row in rows),
        "by_category": {category: _summary(group) for category, group in groups.items()},
        "failures": dict(failures.most_common()),
        "degenerate": _rates([row.get("flags") or () for row in rows]),
    }


def _rates(flags: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    """Return how often each sign of SIGNS was seen, and `any` of the SICK ones."""
    counts = {sign: sum(sign in seen for seen in flags) for sign in SIGNS}
    counts["any"] = sum(not SICK.isdisjoint(seen) for seen in flags)
    rates = {}
    for sign, count in counts.items():
        interval = mean_interval([1.0] * count + [0.0] * (len(flags) - count))
        ends = {"low": interval.low, "high": interval.high}
        rates[sign] = {"count": count, "rate": interval.mean, **ends}
    return rates


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    interval = mean_interval(
        [row["score"] for row in rows],
        [row["weight"] for row in rows],
        [row.get("source") for row in rows],
    )
    return vars(interval).copy()
