"""Paired tests, bootstrap, Holm: is one column better than another on the same prompts?

Does: compare the columns of one evaluation, or of two evaluations by the prompts they share. Give
the mean difference with a bootstrap interval, an exact test, Holm's correction over suites, and a
verdict that may be "cannot tell". Randomness is seeded: the same scores give the same numbers.
Does not: read files, or compare answers to different prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, permutation_test

from mlx_ft.evaluate.stats import CONFIDENCE
from mlx_ft.system.files import hash_of

RESAMPLES = 10_000
SEED = 20_250_101
SIGNIFICANCE = 0.05
POWER = 0.8
MOST_MORE_PROMPTS = 100_000
CHUNK_DRAWS = 4_000_000

Verdict = Literal["better", "worse", "cannot tell"]
Floats = NDArray[np.float64]
Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """One column against another on the same `n` prompts.

    clusters: the sources that the prompts come from.
    difference: the (weighted) mean score of the column minus the other's.
    low, high: the ends of its 95 % interval.
    wins, losses: prompts that scored higher and lower.
    p: two-sided, of the `test`.
    test: `mcnemar` (exact) or `sign_flip`.
    """

    n: int
    clusters: int
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    p: float
    test: str


def compare(
    scores: Sequence[float],
    others: Sequence[float],
    weights: Sequence[float] | None = None,
    sources: Sequence[str | None] | None = None,
) -> Comparison:
    """Compare two columns, prompt by prompt; scores are in [0, 1].

    Prompts of one source (a passage, a user) count as one draw: sources are what is resampled and
    flipped (Miller 2024, arXiv 2411.00640). A source of None is one of its own.

    The interval is a percentile bootstrap of the differences with one prompt won and one lost
    added, as Bonett and Price (2012) add them to their Wald interval. Without them, 27 equal
    answers would give [0, 0]. Simulated where few prompts differ (2 to 15 %), the plain bootstrap
    covered 76 % at n = 27.

    The test is McNemar's, exact, where each prompt is an equally weighted source and all scores are
    0 or 1. Else it is a sign-flip permutation test of the sums by source: every flip while there
    are at most 10,000, else so many seeded ones. For 0 and 1 the two agree.
    """
    assert len(scores) == len(others) > 0, "two columns answer the same prompts"
    weights = [1.0] * len(scores) if weights is None else weights
    differences = np.asarray(scores, dtype=float) - np.asarray(others, dtype=float)
    weight = np.asarray(weights, dtype=float)
    sums, totals = _by_source(differences, weight, sources)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    is_plain = len(sums) == len(scores) and len(set(weights)) == 1
    is_binary = bool(np.isin(differences, (-1, 0, 1)).all())
    if is_plain and is_binary:
        test, p = "mcnemar", mcnemar_p(wins, losses)
    else:
        test, p = "sign_flip", sign_flip_p(sums)
    interval = _interval(sums, totals)
    return Comparison(len(scores), len(sums), *interval, wins, losses, p, test)


def mcnemar_p(wins: int, losses: int) -> float:
    """Return the two-sided p of McNemar's exact test; 1 when no prompt differs."""
    if wins + losses == 0:
        return 1.0
    return float(binomtest(wins, wins + losses, 0.5).pvalue)


def sign_flip_p(sums: Sequence[float] | Floats) -> float:
    """Return the two-sided p of "each sum could as well have had the other sign"."""
    moved = np.asarray([each for each in sums if each != 0])
    if len(moved) == 0:
        return 1.0
    if len(moved) == 1:
        return 1.0  # two flips, both as far from nothing
    result = permutation_test(
        (moved,),
        lambda x, axis: np.abs(np.sum(x, axis=axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=RESAMPLES,
        vectorized=True,
        batch=1000,
        random_state=np.random.default_rng(SEED),
    )
    return float(min(1.0, result.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values corrected for being several (Holm 1979), in the order given."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = largest
    return corrected


def verdict(comparison: Comparison, p: float | None = None) -> Verdict:
    """Return the verdict of the test at 5 %.

    p: the corrected one, where there are several tests.
    """
    if (comparison.p if p is None else p) > SIGNIFICANCE or comparison.difference == 0:
        return "cannot tell"
    return "better" if comparison.difference > 0 else "worse"


def more_prompts(scores: Sequence[float], others: Sequence[float], tests: int = 1) -> int | None:
    """Return about how many more prompts would tell, if they differed as these do, in 4 of 5 tries.

    The usual power calculation for a mean of paired differences, at 5 % shared by `tests`. One win
    and one loss are added to the differences seen. None when there is no difference to go by, or
    when it would take more than 100,000.
    """
    differences = [one - other for one, other in zip(scores, others, strict=True)]
    mean = math.fsum(differences) / len(differences)
    padded = [*differences, 1.0, -1.0]
    centre = math.fsum(padded) / len(padded)
    variance = math.fsum((each - centre) ** 2 for each in padded) / len(padded)
    normal = NormalDist()
    z = normal.inv_cdf(1 - SIGNIFICANCE / 2 / tests) + normal.inv_cdf(POWER)
    if abs(mean) < 1e-9:
        return None
    needed = z * z * variance / (mean * mean)
    more = max(1, math.ceil(needed) - len(differences))
    return more if more <= MOST_MORE_PROMPTS else None


def compare_columns(
    suites: Mapping[str, Mapping[str, Records]],
) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Return suite -> column -> reference -> the comparison as plain JSON.

    `suites` are the rows of each suite and column, prompts in the same order. Every column but the
    base is compared with the base, and every exported one with the adapter; where there is neither,
    every one with the first. Keys are those of Comparison, and `p_holm` (corrected over the
    suites), `verdict`, and `more_prompts`.
    """
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {name: {} for name in suites}
    pairs = dict.fromkeys(
        (column, reference)
        for columns in suites.values()
        for reference in _references(columns)
        for column in columns
        if column not in ("base", reference)
    )
    for column, reference in pairs:
        pair = {
            name: (by[column], by[reference])
            for name, by in suites.items()
            if column in by and reference in by
        }
        for name, entry in _judged(pair).items():
            found[name].setdefault(column, {})[reference] = entry
    return found


def compare_logs(logs: Mapping[str, tuple[Records, Records]]) -> dict[str, dict[str, Any]]:
    """Return suite -> the comparison as plain JSON, its keys as `compare_columns` has them.

    `logs` are the rows of one column in two evaluations, in any order. Only prompts that both
    answered are compared, `n` says how many; a suite without any is left out.
    """
    shared = {name: _shared_prompts(*pair) for name, pair in logs.items()}
    return _judged({name: pair for name, pair in shared.items() if pair[0]})


def _shared_prompts(rows: Records, others: Records) -> tuple[Records, Records]:
    """Return the records of the same questions: same id, messages and target."""
    mine, theirs = (
        {hash_of([row.get(name) for name in ("id", "messages", "target")]): row for row in log}
        for log in ([row for row in log if _is_scored(row)] for log in (rows, others))
    )
    keys = [key for key in mine if key in theirs]
    return [mine[key] for key in keys], [theirs[key] for key in keys]


def _is_scored(row: Mapping[str, Any]) -> bool:
    """Return whether a record has the numbers that a comparison needs; a file may hold anything."""
    weight, source = row.get("weight", 1.0), row.get("source")
    are_numbers = _is_finite(row.get("score")) and _is_finite(weight) and weight > 0
    return are_numbers and (source is None or isinstance(source, str))


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _judged(pairs: Mapping[str, tuple[Records, Records]]) -> dict[str, dict[str, Any]]:
    """Return the comparison of each suite's two columns, corrected for being so many suites."""
    compared = [_compare_rows(*pair) for pair in pairs.values()]
    corrected = holm([each.p for each in compared])
    found = {}
    for (name, pair), each, p in zip(pairs.items(), compared, corrected, strict=True):
        said = verdict(each, p)
        scores, others = (_scores(rows) for rows in pair)
        more = more_prompts(scores, others, len(pairs)) if said == "cannot tell" else None
        found[name] = {**asdict(each), "p_holm": p, "verdict": said, "more_prompts": more}
    return found


def _references(columns: Mapping[str, Any]) -> list[str]:
    known = [name for name in ("base", "adapter") if name in columns]
    return known or list(columns)[:1]


def _scores(rows: Records) -> list[float]:
    return [float(row["score"]) for row in rows]


def _compare_rows(rows: Records, others: Records) -> Comparison:
    assert [row["id"] for row in rows] == [row["id"] for row in others]
    return compare(
        _scores(rows),
        _scores(others),
        [float(row.get("weight", 1.0)) for row in rows],
        [row.get("source") for row in rows],
    )


def _by_source(
    differences: Floats, weights: Floats, sources: Sequence[str | None] | None
) -> tuple[Floats, Floats]:
    """Return the sum of weighted differences, and of weights, of each source."""
    names: list[object] = [
        (index,) if source is None else source
        for index, source in enumerate(sources or [None] * len(differences))
    ]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    groups = np.asarray([numbers[name] for name in names])
    sums = np.bincount(groups, weights=differences * weights).astype(np.float64)
    return sums, np.bincount(groups, weights=weights).astype(np.float64)


def _interval(sums: Floats, totals: Floats) -> tuple[float, float, float]:
    """Return sum(sums) / sum(totals) and the ends of its percentile bootstrap, with a source of
    middling weight won and one lost added.
    """
    difference = float(sums.sum() / totals.sum())
    middling = totals.mean()
    sums = np.append(sums, [middling, -middling])
    totals = np.append(totals, [middling, middling])
    generator = np.random.default_rng(SEED)
    # Equal sources are drawn together: how often each kind comes up is multinomial.
    kinds, counts = np.unique(np.stack([sums, totals], axis=1), axis=0, return_counts=True)
    at_once = max(1, min(RESAMPLES, CHUNK_DRAWS // len(kinds)))
    means = []
    for _ in range(math.ceil(RESAMPLES / at_once)):
        drawn = generator.multinomial(counts.sum(), counts / counts.sum(), size=at_once)
        means.append((drawn @ kinds[:, 0]) / (drawn @ kinds[:, 1]))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return difference, min(float(low), difference), max(float(high), difference)
