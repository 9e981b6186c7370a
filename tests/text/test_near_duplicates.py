"""Twins are found among rows of one template too, without a look at every pair."""

import random

import pytest

from mlx_ft.text import near_duplicates
from mlx_ft.text.near_duplicates import MOST_COMPARED, earlier_twins

TEMPLATE = [f"shared{number}" for number in range(120)]


def templated(seed: int) -> str:
    """A text of 200 words of which the first 120 are in every other one."""
    draw = random.Random(seed)
    return " ".join(TEMPLATE + [f"own{draw.randrange(5000)}" for _ in range(80)])


def test_rows_of_one_template_are_compared_with_few_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs: list[int] = []

    def counted(one: object, other: object) -> float:
        pairs.append(1)
        return 0.0

    monkeypatch.setattr(near_duplicates, "similarity", counted)
    texts = [templated(seed) for seed in range(600)]
    earlier_twins(texts, [""] * len(texts))
    assert 0 < len(pairs) <= MOST_COMPARED * len(texts)


@pytest.mark.parametrize("filed", [8, near_duplicates.MOST_FILED])
def test_twins_among_rows_of_one_template_are_found(
    filed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few texts a band is looked up among: the words of their own are in other bands."""
    monkeypatch.setattr(near_duplicates, "MOST_FILED", filed)
    texts = [templated(seed) for seed in range(500)]
    twins = earlier_twins([*texts, *(f"{text} boat moon" for text in texts)], [""] * 1000)
    assert twins[:500] == [None] * 500
    assert twins[500:] == list(range(500))


def test_twins_stand_in_contexts_that_are_nearly_equal() -> None:
    text, context, other = templated(0), templated(1), " ".join(TEMPLATE[::-1])
    twins = earlier_twins([text] * 4, [context, f"{context} boat", other, "short"])
    assert twins == [None, 0, None, None]
