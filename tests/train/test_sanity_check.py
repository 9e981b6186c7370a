"""A degenerate model does not pass for a trained one, and the answers that show it are kept."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.engine.load import LoadedModel, load_model
from mlx_ft.errors import GateFailed
from mlx_ft.model.chat import ChatFormat
from mlx_ft.system.console import Console
from mlx_ft.system.files import read_json_lines
from mlx_ft.train.sanity_check import (
    MAX_TOKENS,
    SAMPLES,
    TALK_PROMPTS,
    Prompt,
    SanitySample,
    choose_prompts,
    require_sane,
    sanity_samples,
)
from tests.support.models import write_tiny_model
from tests.support.trainings import quiet


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


TALK = [Prompt(user(text)) for text in TALK_PROMPTS]
PROMPTS = (st.text(max_size=3).map(user) | st.just([])).map(Prompt)
ROWS = st.lists(st.tuples(st.none() | st.sampled_from("abcd"), PROMPTS), max_size=12)


@given(rows=ROWS)
def test_prompts_are_of_as_many_categories_as_there_are(
    rows: list[tuple[str | None, Prompt]],
) -> None:
    """Ordinary talk always, then validation prompts: no category twice before each came once."""
    chosen = choose_prompts(rows)
    usable = [(category, prompt) for category, prompt in rows if prompt.messages]
    room = SAMPLES - len(TALK)
    assert len(chosen) == min(len(usable), room) + len(TALK) <= SAMPLES
    assert chosen[-len(TALK) :] == TALK
    assert all(prompt.messages for prompt in chosen), "an empty conversation cannot be prompted"
    distinct = list(dict.fromkeys(category for category, _ in usable))
    firsts = [next(p for c, p in usable if c == category) for category in distinct]
    from_rows = chosen[: -len(TALK)]
    assert from_rows[: len(firsts)] == firsts[:room]
    assert all(any(p is prompt for _, p in usable) for prompt in from_rows)


def sample(index: int, degenerate: str | None) -> SanitySample:
    return SanitySample(user(f"question {index}"), f"answer {index} ", "length", 3, degenerate)


@pytest.mark.parametrize("bad", range(SAMPLES + 1))
def test_two_degenerate_answers_of_five_stop_the_run(bad: int) -> None:
    """One alone does not: small models loop now and then by themselves."""
    reasons = ["the last 64 tokens repeat"] * bad + [None] * (SAMPLES - bad)
    samples = [sample(index, reason) for index, reason in enumerate(reasons)]
    if bad < 2:
        require_sane(samples)
        return
    with pytest.raises(GateFailed) as caught:
        require_sane(samples)
    assert caught.value.exit_code == 1
    assert len(caught.value.faults) == bad
    for index in range(SAMPLES):
        shown = f"question {index}" in str(caught.value) and f"answer {index}" in str(caught.value)
        assert shown == (index < bad)


def test_a_long_prompt_does_not_bury_the_reason() -> None:
    long = SanitySample(user("x" * 10_000), "y" * 10_000, "length", 64, "repeats")
    with pytest.raises(GateFailed) as caught:
        require_sane([long, long])
    assert all(len(str(fault)) < 400 for fault in caught.value.faults)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    return load_model(folder, ChatFormat())


def test_a_random_model_is_caught_and_its_answers_are_kept(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    """A model that learned nothing repeats itself: real answers, stopped, shown and on disk."""
    said = io.StringIO()
    file = tmp_path / "samples.jsonl"
    samples = sanity_samples(
        loaded, choose_prompts([("a", Prompt(user("the fox")))]), file, Console(said)
    )
    with pytest.raises(GateFailed) as caught:
        require_sane(samples)
    rows = read_json_lines(file)
    assert [row["messages"] for row in rows] == [
        user("the fox"),
        *(prompt.messages for prompt in TALK),
    ]
    degenerate = [row for row in rows if row["degenerate"]]
    assert len(degenerate) == len(caught.value.faults) >= 2
    assert all(row["generated_tokens"] <= MAX_TOKENS for row in rows)
    shown = said.getvalue()
    for row in rows:
        assert row["messages"][-1]["content"] in shown
        assert row["text"].strip().replace("\n", "\n    ") in shown
        assert (row["degenerate"] or "") in shown


def test_samples_come_back_from_disk_as_they_were(loaded: LoadedModel, tmp_path: Path) -> None:
    """Texts with line separators, quotes and other alphabets too."""
    odd = [{"role": "system", "content": "Sei\u2028kurz."}, *user('"Zwölf" \u2029\x85\n🦊\\n')]
    file = tmp_path / "samples.jsonl"
    (sampled,) = sanity_samples(loaded, [Prompt(odd)], file, quiet())
    (row,) = read_json_lines(file)
    assert SanitySample(**row) == sampled
    assert sampled.messages == odd
    assert json.loads(file.read_text(encoding="utf-8")) == row


def test_tools_that_a_row_offers_are_offered_again(loaded: LoadedModel, tmp_path: Path) -> None:
    """Else the model is looked at in a situation that it was not trained for."""
    asked: list[Any] = []
    renderer = loaded.renderer
    tool = {"type": "function", "function": {"name": "read_file", "parameters": {}}}
    right = type(renderer).prompt_ids

    def remember(self: Any, messages: Any, tools: Any = None) -> list[int]:
        asked.append(tools)
        return right(self, messages, tools)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(renderer), "prompt_ids", remember)
        sanity_samples(
            loaded, [Prompt(user("open it"), [tool])], tmp_path / "samples.jsonl", quiet()
        )
    assert asked == [[tool]]
