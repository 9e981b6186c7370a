"""Comparing columns: exact where tables are exact, covering where simulated, never too sure."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ft.evaluate.paired_stats import (
    Comparison,
    _interval,
    compare,
    compare_columns,
    compare_logs,
    holm,
    mcnemar_p,
    more_prompts,
    sign_flip_p,
    verdict,
)
from mlx_ft.evaluate.stats import mean_interval
from tests.support.slow import fast_first

GRADES = st.sampled_from([0.0, 0.5, 1.0])
PAIRS = st.lists(st.tuples(GRADES, GRADES), min_size=1, max_size=40)

# statsmodels 0.15.0: mcnemar([[10, b], [c, 10]], exact=True).pvalue
STATSMODELS_MCNEMAR = {
    (5, 0): 0.0625,
    (6, 0): 0.03125,
    (9, 1): 0.021484375,
    (10, 2): 0.03857421875,
    (12, 4): 0.076812744140625,
    (20, 10): 0.09873714670538905,
    (3, 3): 1.0,
    (0, 0): 1.0,
}


@pytest.mark.parametrize(("wins", "losses"), STATSMODELS_MCNEMAR)
def test_mcnemar_is_exact(wins: int, losses: int) -> None:
    expected = STATSMODELS_MCNEMAR[wins, losses]
    assert mcnemar_p(wins, losses) == pytest.approx(expected, abs=1e-12)
    scores = [1.0] * wins + [0.0] * losses + [1.0] * 7
    others = [0.0] * wins + [1.0] * losses + [1.0] * 7
    found = compare(scores, others)
    assert (found.test, found.wins, found.losses) == ("mcnemar", wins, losses)
    assert found.p == pytest.approx(expected, abs=1e-12)


@settings(max_examples=30)
@given(st.integers(0, 7), st.integers(0, 6))
def test_flipping_signs_is_mcnemar_where_every_prompt_is_won_or_lost(
    wins: int, losses: int
) -> None:
    assert sign_flip_p([1.0] * wins + [-1.0] * losses) == pytest.approx(mcnemar_p(wins, losses))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # statsmodels 0.15.0: multipletests(p, method="holm")[1]
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.2, 0.02, 0.02, 0.9], [0.4, 0.08, 0.08, 0.9]),
        ([0.03], [0.03]),
        ([], []),
    ],
)
def test_holm(given: list[float], expected: list[float]) -> None:
    assert holm(given) == pytest.approx(expected)


@settings(max_examples=60)
@given(PAIRS)
def test_a_comparison_turned_around_is_its_mirror(pairs: list[tuple[float, float]]) -> None:
    one, other = (list(each) for each in zip(*pairs, strict=True))
    found, mirrored = compare(one, other), compare(other, one)
    assert found.difference == pytest.approx(-mirrored.difference)
    assert (found.wins, found.losses) == (mirrored.losses, mirrored.wins)
    assert found.p == pytest.approx(mirrored.p, abs=0.02)
    assert found.low <= found.difference <= found.high
    assert found.low < found.high, "no number of prompts makes anything certain"
    assert found == compare(one, other), "the same scores give the same numbers"


def test_equal_columns_prove_nothing_but_bound_the_difference() -> None:
    found = compare([1.0] * 27, [1.0] * 27)
    assert (found.difference, found.p, verdict(found)) == (0.0, 1.0, "cannot tell")
    assert found.low == pytest.approx(-found.high) and 0.05 < found.high < 0.2
    assert more_prompts([1.0] * 27, [1.0] * 27) is None
    assert compare([1.0] * 400, [1.0] * 400).high < 0.02


def test_the_verdict_needs_the_corrected_p() -> None:
    found = compare([1.0] * 6 + [0.0] * 21, [0.0] * 27)
    assert verdict(found) == "better" and verdict(found, 2 * found.p) == "cannot tell"
    assert verdict(compare([0.0] * 27, [1.0] * 6 + [0.0] * 21)) == "worse"


def test_so_many_more_prompts_would_tell_in_four_of_five_tries() -> None:
    scores, others = [1.0] * 5 + [0.0] * 22, [0.0] * 3 + [0.0] * 24
    others[5] = 1.0
    more = more_prompts(scores, others)
    assert more is not None
    n = 27 + more
    # As these differ, with the win and the loss that are added: 6 of 29 won, 2 lost.
    generator = np.random.default_rng(3)
    wins = generator.multinomial(n, [5 / 27, 1 / 27, 21 / 27], size=400)
    told = np.mean([mcnemar_p(won, lost) <= 0.05 for won, lost, _ in wins])
    assert 0.7 <= told <= 0.97
    stricter = more_prompts(scores, others, tests=4)
    assert stricter is not None and stricter > more


def test_prompts_of_one_source_are_one_draw() -> None:
    scores = [1.0] * 8 + [0.0] * 8
    others = [0.0] * 16
    sources: list[str | None] = [f"passage {index // 4}" for index in range(16)]
    alone, together = compare(scores, others), compare(scores, others, None, sources)
    assert (alone.clusters, together.clusters, together.n) == (16, 4, 16)
    assert together.p > alone.p and together.test == "sign_flip"
    assert together.high - together.low > alone.high - alone.low
    apart: list[str | None] = [None] * 16
    assert compare(scores, others, None, apart) == alone
    wide, narrow = mean_interval(scores, None, sources), mean_interval(scores)
    assert wide.mean == narrow.mean and wide.high - wide.low > narrow.high - narrow.low


def test_weights_count() -> None:
    scores, others = [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]
    assert compare(scores, others).difference == 0
    weighted = compare(scores, others, [3.0, 1.0, 1.0])
    assert weighted.difference == pytest.approx(2 / 5) and weighted.test == "sign_flip"


def _covers(shares: np.ndarray, n: int, draws: int, generator: np.random.Generator) -> list[bool]:
    grades = np.array([-1, -0.5, 0, 0.5, 1])
    true = float(shares @ grades)
    hits = []
    for differences in generator.choice(grades, p=shares, size=(draws, n)):
        _, low, high = _interval(differences, np.ones(n))  # as `compare` does, without its test
        hits.append(low - 1e-12 <= true <= high + 1e-12)
    return hits


@pytest.mark.parametrize("n", fast_first([27, 100, 400]))
def test_95_percent_intervals_of_differences_cover_93_to_97(n: int) -> None:
    """Over a spread of pairs of models: shares of lost, half lost, equal, half won and won prompts
    are drawn from a flat Dirichlet that doubles the equal ones. (Where few prompts differ the
    interval is wider than it would have to be; LOG.md has those figures.)
    """
    generator = np.random.default_rng(n)
    hits = [
        hit
        for shares in generator.dirichlet([1, 1, 2, 1, 1], size=60)
        for hit in _covers(shares, n, 10, generator)
    ]
    # 600 draws scatter by about 0.01 around the coverage itself.
    assert 0.93 - 0.01 <= np.mean(hits) <= 0.97 + 0.01


def rows(scores: list[float]) -> list[dict[str, object]]:
    return [{"id": str(i), "score": s, "weight": 1.0} for i, s in enumerate(scores)]


def test_columns_are_compared_with_base_and_adapter_and_corrected_over_suites() -> None:
    good, bad = rows([1.0] * 6 + [0.0] * 21), rows([0.0] * 27)
    suites = {
        name: {"base": bad, "adapter": good, "quantized": good} for name in ("one", "two", "three")
    }
    suites["three"] = {"base": bad, "adapter": bad}
    found = compare_columns(suites)
    assert set(found["one"]["quantized"]) == {"base", "adapter"}
    assert set(found["one"]["adapter"]) == {"base"}
    assert "base" not in found["one"]
    against = found["one"]["adapter"]["base"]
    assert against["p"] == pytest.approx(0.03125) and against["p_holm"] == pytest.approx(0.09375)
    assert against["verdict"] == "cannot tell" and against["n"] == 27
    assert against["more_prompts"] is not None
    assert found["one"]["quantized"]["base"]["p_holm"] == pytest.approx(0.0625)
    assert compare_columns({"s": {"mine": good, "other": bad}})["s"].keys() == {"other"}
    assert all(math.isfinite(v) for v in against.values() if isinstance(v, float))


def test_a_comparison_says_its_n() -> None:
    assert "n" in Comparison.__dataclass_fields__


def test_five_prompts_are_too_few_for_a_verdict_and_six_are_enough() -> None:
    assert verdict(compare([1.0] * 5, [0.0] * 5)) == "cannot tell"
    assert verdict(compare([1.0] * 6, [0.0] * 6)) == "better"


def line(number: int, score: object, asked: str = "hello", **more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": asked}]
    return {"id": str(number), "messages": messages, "target": "x", "score": score, **more}


def test_only_the_same_prompts_with_the_same_target_are_compared() -> None:
    mine = [line(1, 1.0), line(2, 1.0), line(3, 1.0, "changed"), line(4, 1.0), line(5, 1.0)]
    theirs = [line(2, 1.0), line(1, 0.0), line(3, 0.0), line(4, 0.0) | {"target": "y"}]
    found = compare_logs({"s": (mine, theirs), "nothing shared": (mine, [])})
    assert list(found) == ["s"]
    assert [found["s"][key] for key in ("n", "wins", "losses")] == [2, 1, 0]


@pytest.mark.parametrize(
    "torn",
    [{"score": math.nan}, {"score": None}, {"score": True}, {"weight": 0.0}, {"source": ["a"]}],
)
def test_a_line_that_cannot_be_compared_is_left_out(torn: dict[str, object]) -> None:
    whole, broken = [line(1, 1.0), line(2, 1.0)], [line(1, 0.0), line(2, 0.0) | torn]
    assert compare_logs({"s": (whole, broken)})["s"]["n"] == 1
    assert compare_logs({"s": (broken, whole)})["s"]["n"] == 1


def test_two_logs_are_judged_as_two_columns_of_one_evaluation_are() -> None:
    scores = {"one": [1.0, 0.0, 1.0, 1.0, 0.5], "two": [0.0] * 5}
    logs = {
        suite: {
            name: [
                line(n, each if name == "quantized" else 0.0, weight=1.0 + n, source=str(n // 2))
                for n, each in enumerate(graded)
            ]
            for name in ("base", "quantized")
        }
        for suite, graded in scores.items()
    }
    turned = {suite: (by["quantized"], by["base"][::-1]) for suite, by in logs.items()}
    together = compare_columns(logs)
    assert compare_logs(turned) == {suite: together[suite]["quantized"]["base"] for suite in logs}
