"""Intervals: Wilson's exactly where scores are 0 and 1, with honest coverage where graded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from mlx_ft.evaluate.stats import mean_interval, summarise, wilson_interval

GRADES = st.sampled_from([0.0, 0.5, 1.0])
CONFIDENCE = 0.95


@pytest.mark.parametrize(("passed", "n"), [(0, 1), (1, 1), (0, 27), (24, 27), (27, 27), (37, 400)])
def test_pass_rates_get_scipys_wilson_interval(passed: int, n: int) -> None:
    expected = binomtest(passed, n).proportion_ci(CONFIDENCE, method="wilson")
    interval = mean_interval([1.0] * passed + [0.0] * (n - passed))
    assert interval.n == n and interval.mean == pytest.approx(passed / n)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson_interval(passed / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.lists(GRADES, min_size=1, max_size=60))
def test_an_interval_holds_its_mean_and_is_never_a_point(scores: list[float]) -> None:
    interval = mean_interval(scores)
    assert interval.mean == pytest.approx(np.mean(scores))
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1
    assert interval.high - interval.low > 0
    low, high = wilson_interval(interval.mean, interval.n)
    assert interval.high - interval.low <= high - low + 1e-12, "graded scores vary less than 0/1"


@given(st.lists(GRADES, min_size=1, max_size=40))
def test_turning_the_scores_around_turns_the_interval_around(scores: list[float]) -> None:
    interval, mirrored = mean_interval(scores), mean_interval([1 - score for score in scores])
    assert mirrored.low == pytest.approx(1 - interval.high)
    assert mirrored.high == pytest.approx(1 - interval.low)


@given(st.lists(GRADES, min_size=1, max_size=20), st.floats(0.1, 10))
def test_equal_weights_change_nothing(scores: list[float], weight: float) -> None:
    plain, weighted = mean_interval(scores), mean_interval(scores, [weight] * len(scores))
    assert (weighted.mean, weighted.low, weighted.high) == pytest.approx(
        (plain.mean, plain.low, plain.high)
    )


def test_weights_move_the_mean_and_cost_certainty() -> None:
    scores = [1.0] * 10 + [0.0] * 10
    weighted = mean_interval(scores, [3.0] * 10 + [1.0] * 10)
    assert weighted.mean == pytest.approx(0.75)
    effective_n = 40**2 / (10 * 9 + 10)
    assert (weighted.low, weighted.high) == pytest.approx(wilson_interval(0.75, effective_n))
    assert effective_n < 20


def test_four_hundred_perfect_scores_say_more_than_twenty_seven() -> None:
    assert mean_interval([1.0] * 27).low == pytest.approx(0.8754, abs=1e-4)
    assert mean_interval([1.0] * 400).low > 0.99


@pytest.mark.parametrize("n", [27, 100, 400])
def test_intervals_cover_the_true_mean(n: int) -> None:
    """Over a spread of models (shares of 0, 0.5 and 1), 95 % intervals cover 93 to 97 %."""
    generator = np.random.default_rng(7)
    draws, hits = 0, 0
    for share in generator.dirichlet([1, 1, 1], size=400):
        for scores in generator.choice([0.0, 0.5, 1.0], p=share, size=(4, n)):
            interval = mean_interval(list(scores))
            hits += interval.low <= share @ [0, 0.5, 1] <= interval.high
            draws += 1
    assert 0.93 <= hits / draws <= 0.97


@pytest.mark.parametrize(
    "share",
    [(0.05, 0.05, 0.9), (0.02, 0.08, 0.9), (0.1, 0.3, 0.6), (0, 0.5, 0.5), (0.8, 0.15, 0.05)],
)
def test_27_samples_cover_for_each_of_these_models(share: tuple[float, float, float]) -> None:
    generator = np.random.default_rng(11)
    true_mean = float(np.dot(share, [0, 0.5, 1]))
    samples = generator.choice([0.0, 0.5, 1.0], p=share, size=(1500, 27))
    intervals = [mean_interval(list(scores)) for scores in samples]
    covered = sum(each.low <= true_mean <= each.high for each in intervals) / len(intervals)
    wilson = [wilson_interval(each.mean, each.n) for each in intervals]
    assert covered >= 0.93
    assert np.mean([each.high - each.low for each in intervals]) < np.mean(
        [high - low for low, high in wilson]
    )


def row(category: str, score: float, failure: str | None, weight: float = 1.0) -> dict[str, object]:
    return {"category": category, "score": score, "failure": failure, "weight": weight}


def test_a_summary_counts_every_row_once() -> None:
    rows = [
        row("read", 1.0, None),
        row("check", 0.5, "wrong_wrapper"),
        row("read", 0.0, "prose"),
        row("check", 0.0, "prose"),
    ]
    summary = summarise(rows)
    assert (summary["mean"], summary["n"], summary["passed"]) == (0.375, 4, 1)
    assert list(summary["by_category"]) == ["read", "check"]
    assert summary["by_category"]["read"]["mean"] == 0.5
    assert sum(each["n"] for each in summary["by_category"].values()) == 4
    assert list(summary["failures"].items()) == [("prose", 2), ("wrong_wrapper", 1)]
    keys = {"mean", "n", "low", "high", "passed", "by_category", "failures", "degenerate"}
    assert set(summary) == keys
