"""What chooses a checkpoint is apart from what measures it, and fair to every category."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ft.errors import DataError
from mlx_ft.evaluate.checkpoint_prompts import chooser, evaluated
from mlx_ft.evaluate.suites import load_suite
from mlx_ft.preflight.stage import FEWEST_LEFT, selection_finding
from mlx_ft.recipe.schema import SelectRecipe
from tests.support.paths import ROOT
from tests.support.suites import write_suite


def select(path: str, limit: int) -> SelectRecipe:
    return SelectRecipe(suite=path, limit=limit)


@given(limit=st.integers(1, 30))
@settings(max_examples=30)
def test_no_category_is_asked_twice_more_than_another_that_has_prompts_left(limit: int) -> None:
    path = str(ROOT / "evals" / "code_mode.yaml")
    whole, taken = load_suite(Path(path)), chooser(select(path, limit))
    assert taken is not None and len(taken.samples) == min(limit, len(whole.samples))
    has = Counter(sample.category for sample in whole.samples)
    asked = Counter(sample.category for sample in taken.samples)
    unfinished = [asked[category] for category in has if asked[category] < has[category]]
    assert max(asked.values()) - min(unfinished, default=99) <= 1
    order = [sample.id for sample in whole.samples]
    assert [s.id for s in taken.samples] == sorted((s.id for s in taken.samples), key=order.index)


def test_prompts_that_choose_are_left_out_of_the_evaluation_of_their_suite(tmp_path: Path) -> None:
    path = write_suite(tmp_path, "one", [("a", f"question {number}") for number in range(6)])
    whole, choosing = load_suite(Path(path)), chooser(select(path, 4))
    assert choosing is not None
    (rest,) = evaluated([whole], [path], choosing)
    chosen, left = ({s.id for s in suite.samples} for suite in (choosing, rest))
    assert not chosen & left and chosen | left == {s.id for s in whole.samples}
    all_of_them = chooser(select(path, 6))
    assert all_of_them is not None
    with pytest.raises(DataError, match="all of its 6 prompts choose") as caught:
        evaluated([whole], [path], all_of_them)
    assert "train.select.limit" in str(caught.value)


def test_a_prompt_of_another_suite_in_the_same_words_is_refused(tmp_path: Path) -> None:
    choosing = chooser(select(write_suite(tmp_path, "own", [("a", "Is it  there?")]), 24))
    assert choosing is not None
    path = write_suite(tmp_path, "final", [("b", "something else"), ("b", "is it there")])
    with pytest.raises(DataError) as caught:
        evaluated([load_suite(Path(path))], [path], choosing)
    (fault,) = caught.value.faults
    assert "final-1" in fault.where and "own-0" in fault.found


@pytest.mark.parametrize(("limit", "level"), [(4, "ok"), (6, "warn")])
def test_too_few_prompts_left_to_measure_with_is_said(
    tmp_path: Path, limit: int, level: str
) -> None:
    asked = [("a", f"question {number}") for number in range(FEWEST_LEFT + 4)]
    path = write_suite(tmp_path, "one", asked)
    choosing = chooser(select(path, limit))
    assert choosing is not None
    rest = evaluated([load_suite(Path(path))], [path], choosing)
    assert selection_finding(choosing, rest).level == level
    assert selection_finding(choosing, ()).level == "ok"


def test_suites_that_share_nothing_stay_whole(tmp_path: Path) -> None:
    choosing = chooser(select(write_suite(tmp_path, "own", [("a", "one")]), 24))
    path = write_suite(tmp_path, "final", [("b", "two"), ("b", "three")])
    suite = load_suite(Path(path))
    assert choosing is not None and evaluated([suite], [path], choosing) == (suite,)


@pytest.mark.parametrize("metric", [None, "validation_loss"])
def test_no_suite_chooses_unless_the_recipe_says_so(metric: str | None) -> None:
    assert chooser(SelectRecipe.model_validate({"metric": metric})) is None
