"""A prompt of the evaluation that stands in a training row is found, and no other."""

from typing import Any

import pytest

from mlx_ft.data.contamination import (
    RUN_WORDS,
    Contamination,
    contaminated_prompts,
    last_question,
)
from mlx_ft.data.rows import Row

WORDS = [f"word{number}" for number in range(40)]


def row(line: int, *turns: str, text: str | None = None) -> Row:
    messages: tuple[dict[str, Any], ...] | None = tuple(
        {"role": ("user", "assistant")[index % 2], "content": turn}
        for index, turn in enumerate(turns)
    )
    return Row(line, "messages", messages if text is None else None, text, None, None)


def test_a_question_is_found_whatever_its_dress() -> None:
    rows = [row(3, "Hi", "Hello"), row(4, "what is  a Rainbow", "It is light."), row(5, "Hi", "Ho")]
    prompts = {"talk/1": "What is a rainbow?", "talk/2": "What is a rain?", "talk/3": "hi!"}
    assert contaminated_prompts(rows, prompts) == [
        Contamination("talk/1", 4, whole=True),
        Contamination("talk/3", 3, whole=True),
    ]


def test_an_answer_that_equals_a_short_prompt_is_none() -> None:
    assert contaminated_prompts([row(1, "Greet me", "Hello!")], {"a": "Hello!"}) == []


@pytest.mark.parametrize("common", [RUN_WORDS - 1, RUN_WORDS])
@pytest.mark.parametrize("place", ["question", "answer", "text"])
def test_thirteen_words_in_common_count(common: int, place: str) -> None:
    shared = " ".join(WORDS[:common])
    prompt = f"Please: {shared} and no more"
    text = f"It said {shared}, then it ended."
    rows = {
        "question": [row(9, text, "yes")],
        "answer": [row(9, "what?", text)],
        "text": [row(9, text=text)],
    }[place]
    wanted = [Contamination("p", 9, whole=False)] if common == RUN_WORDS else []
    assert contaminated_prompts(rows, {"p": prompt}) == wanted


def test_a_whole_question_outweighs_a_run_found_earlier() -> None:
    text = " ".join(WORDS[:20])
    rows = [row(1, "x", f"so {text} so"), row(2, text, "y")]
    assert contaminated_prompts(rows, {"p": text}) == [Contamination("p", 2, whole=True)]


def test_nothing_asked_and_nothing_there() -> None:
    assert (
        contaminated_prompts([], {"a": "b"}) == contaminated_prompts([row(1, "b", "c")], {}) == []
    )
    assert contaminated_prompts([row(1, "?!", "c")], {"a": "..."}) == []


def test_a_tools_result_is_no_question() -> None:
    """Everyone's tools answer `ok`: the rows would all seem to hold the prompt."""
    asked = {"role": "user", "content": "lint it"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "lint"}]}
    assert last_question([asked, call, {"role": "tool", "content": "ok"}]) == "lint it"
    assert last_question([asked, call, {"role": "user", "content": "again"}]) == "again"
    assert last_question([{"role": "system", "content": "be brief"}]) == ""
