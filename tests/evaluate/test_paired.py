"""Paired verdicts: exact, symmetrical, and only of what both were asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from mlx_ft.evaluate.paired import paired, paired_rows, sign_test

COUNTS = st.integers(0, 60)
SCORES = st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 2), min_size=1, max_size=60)


@given(COUNTS, COUNTS)
def test_the_sign_test_is_scipys_exact_binomial_test(wins: int, losses: int) -> None:
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


@given(SCORES)
def test_who_is_compared_with_whom_only_turns_the_sign(scores: list[tuple[float, float]]) -> None:
    mine, theirs = [a for a, _ in scores], [b for _, b in scores]
    there, back = paired(mine, theirs), paired(theirs, mine)
    assert (there.wins, there.losses, there.p) == (back.losses, back.wins, back.p)
    assert there.difference == -back.difference
    turned = {"better": "worse", "worse": "better"}
    assert back.verdict == turned.get(there.verdict, there.verdict)
    assert there.difference == pytest.approx(sum(mine) / len(mine) - sum(theirs) / len(theirs))


def test_five_prompts_are_too_few_for_a_verdict_and_six_are_enough() -> None:
    assert paired([1.0] * 5, [0.0] * 5).verdict == "no difference shown"
    assert paired([1.0] * 6, [0.0] * 6).verdict == "better"


def row(number: int, score: float, asked: str = "hello") -> dict[str, object]:
    messages = [{"role": "user", "content": asked}]
    return {"id": str(number), "messages": messages, "target": "x", "score": score, "key": "k"}


def test_only_the_same_prompts_with_the_same_target_are_paired() -> None:
    mine = [row(1, 1.0), row(2, 1.0), row(3, 1.0, "changed"), row(4, 1.0)]
    theirs = [row(1, 0.0), row(2, 1.0), row(3, 0.0), {**row(4, 0.0), "target": "y"}]
    found = paired_rows(mine, theirs)
    assert found is not None
    assert (found.n, found.wins, found.losses) == (2, 1, 0)
    assert paired_rows(mine, []) is None
