"""Replayed prompts are ordinary, many, and never those that measure whether talk was forgotten."""

from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.data.contamination import contaminated_prompts, last_question
from mlx_ft.data.replay import CATEGORY, replay_prompts, replay_rows, rows_wanted
from mlx_ft.evaluate.suites import load_suites
from tests.support.paths import ROOT


def test_the_prompts_are_many_and_differ() -> None:
    prompts = replay_prompts()
    assert len(prompts) >= 120
    assert len({prompt.lower() for prompt in prompts}) == len(prompts)
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)


def test_no_suite_asks_what_is_replayed() -> None:
    suites = load_suites(sorted((ROOT / "evals").rglob("*.yaml")))
    asked = {
        f"{suite.name}/{sample.id}": last_question(sample.messages)
        for suite in suites
        for sample in suite.samples
    }
    assert len(asked) > 60
    rows = replay_rows(dict.fromkeys(replay_prompts(), "x"))
    assert contaminated_prompts(rows, asked) == []


@given(st.integers(10, 10**5), st.floats(0.01, 0.9))
def test_the_added_rows_are_the_share_of_all(rows: int, share: float) -> None:
    added = rows_wanted(rows, share)
    assert added >= 1
    assert abs(added / (rows + added) - share) <= 1 / rows


def test_rows_of_answers_stand_in_no_file() -> None:
    one, other = replay_rows({"Hi": "Hello", "Bye": "Goodbye"})
    assert (one.line, other.line, other.category) == (-1, -2, CATEGORY)
    assert [message["content"] for message in other.messages or ()] == ["Bye", "Goodbye"]
