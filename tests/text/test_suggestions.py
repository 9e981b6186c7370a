"""An unknown name is answered with the nearest known one, or with what helps otherwise."""

import pytest

from mlx_ft.text.suggestions import did_you_mean, suggestion

NAMES = ("batch_size", "max_tokens", "seed")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("batchsize", "did you mean batch_size?"),
        ("max_token", "did you mean max_tokens?"),
        ("seed", "did you mean seed?"),
        ("colour", "choose one"),
        ("", "choose one"),
    ],
)
def test_the_nearest_name_is_suggested(word: str, expected: str) -> None:
    assert suggestion(word, NAMES, "choose one") == expected


def test_without_candidates_or_another_text_nothing_is_said() -> None:
    assert suggestion("seed", []) == ""
    assert suggestion("seed", (), "add it") == "add it"


def test_the_cutoff_says_how_near_is_near() -> None:
    assert suggestion("sad", NAMES) == ""
    assert suggestion("sad", NAMES, cutoff=0.5) == "did you mean seed?"


def test_a_candidate_is_written_as_asked() -> None:
    assert suggestion("sed", iter(NAMES), written="`{}`".format) == "did you mean `seed`?"


def test_several_candidates_are_one_question() -> None:
    assert did_you_mean(["a", "b"], "no") == "did you mean a or b?"
    assert did_you_mean([], "no") == "no"
