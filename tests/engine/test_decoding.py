"""Whoever is read and answered beside a prompt, and whatever it begins with, it says the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

from mlx_ft.engine import decoding
from mlx_ft.engine.decoding import Decoded, Reader, answer_prompts
from mlx_ft.engine.generate import generate
from mlx_ft.engine.likelihood import likelihoods
from mlx_ft.engine.load import LoadedModel, load_model, scalar
from mlx_ft.model.chat import ChatFormat, ChatRenderer
from tests.support.models import write_tiny_model
from tests.support.slow import fast_first

VOCABULARY = 300
SYSTEM = [(7 * number) % VOCABULARY for number in range(60)]
TOOLS = [(11 * number + 3) % VOCABULARY for number in range(40)]
# A system prompt for all but the last; tools for some; lengths of 1 to 120 tokens.
PROMPTS = [
    *([*SYSTEM, *TOOLS, *range(number, number + 3 * number % 17 + 1)] for number in range(3, 9)),
    *([*SYSTEM, *range(number, number + number % 5 + 1)] for number in range(100, 106)),
    [5, 6, 7],
    [5],
]
KINDS = ("llama", "qwen3", "gemma3_text")


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    layers = 7 if request.param == "gemma3_text" else 2
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), request.param, layers=layers)
    return load_model(folder, ChatFormat())


def plainly(model: nn.Module, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """Return what a model says by its own forward pass, without a cache, a token at a time."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(scalar(mx.argmax(model(mx.array([ids]))[0, -1]))))
    return tuple(ids[len(prompt) :])


def answered(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], batch_size: int, limits: Sequence[int]
) -> dict[int, tuple[tuple[int, ...], str]]:
    found: dict[int, tuple[tuple[int, ...], str]] = {}

    def on_done(index: int, answer: Decoded) -> None:
        assert index not in found, "an answer ends once"
        found[index] = answer.ids, answer.finish_reason

    answer_prompts(
        loaded.model,
        prompts,
        stop_ids=(),
        max_tokens=limits,
        batch_size=batch_size,
        on_done=on_done,
    )
    return found


@pytest.mark.parametrize("batch_size", fast_first([3, 1, 16]))
@pytest.mark.parametrize("ahead", [False, True])
def test_answers_are_those_of_the_plain_model(
    loaded: LoadedModel, batch_size: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few places, with many, and in the order in which a GPU works."""
    monkeypatch.setattr(decoding, "on_cpu", lambda: not ahead)
    limits = [4 + 5 * index % 9 for index in range(len(PROMPTS))]
    found = answered(loaded, PROMPTS, batch_size, limits)
    for index, prompt in enumerate(PROMPTS):
        assert found[index] == (plainly(loaded.model, prompt, limits[index]), "length"), index


def test_what_prompts_share_is_read_once_and_changes_nothing(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states of a row, and the logits that follow, are those of reading it whole."""
    read_tokens = 0
    kind: Any = type(loaded.model)
    call = kind.__call__

    def counting(self: Any, ids: mx.array, *rest: Any, **named: Any) -> mx.array:
        nonlocal read_tokens
        read_tokens += ids.size
        logits: mx.array = call(self, ids, *rest, **named)
        return logits

    reader = Reader(loaded.model, PROMPTS)
    order = reader.order()
    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", counting)
        cache = reader.read(order)
    last = mx.array([[PROMPTS[index][-1]] for index in order])
    together = loaded.model(last, cache=cache)[:, -1]
    for place, index in enumerate(order):
        alone = loaded.model(mx.array([PROMPTS[index]]))[0, -1]
        assert mx.allclose(together[place], alone, rtol=1e-4, atol=1e-4), index
    whole = sum(map(len, PROMPTS))
    plain = loaded.config["model_type"] != "gemma3_text"
    assert read_tokens > 0 and (read_tokens < whole / 2) is plain, "windows are read whole"


def test_a_start_stays_as_it_was_read(loaded: LoadedModel) -> None:
    """Rows that go on from a start do not write into it."""
    reader = Reader(loaded.model, PROMPTS)
    first = reader.read([0, 1])
    loaded.model(mx.array([[1], [2]]), cache=first)
    again = reader.read([0, 1])
    fresh = Reader(loaded.model, PROMPTS).read([0, 1])
    token = mx.array([[3], [4]])
    assert mx.array_equal(loaded.model(token, cache=again), loaded.model(token, cache=fresh))


def test_a_model_whose_masks_are_not_for_several_prompts_takes_one_at_a_time(
    tmp_path: Path,
) -> None:
    """mlx-lm's Gemma 2 fails on three prompts together, and with as many as it has groups of heads
    it would mask one prompt's tokens by another's."""
    folder = write_tiny_model(tmp_path, "gemma2")
    model = load_model(folder, ChatFormat())
    three = [PROMPTS[0], PROMPTS[-2], PROMPTS[-1]]
    cache = Reader(model.model, three).read
    with pytest.raises(ValueError, match="broadcast"):
        cache([0, 1, 2])
    found = answered(model, PROMPTS, 16, [4] * len(PROMPTS))
    for index, prompt in enumerate(PROMPTS):
        assert found[index] == (plainly(model.model, prompt, 4), "length"), index
    (first, second) = likelihoods(model, [[5, 6, 7], [8]], [[9, 10], [11, 12]], batch_size=2)
    assert first == likelihoods(model, [[5, 6, 7]], [[9, 10]])[0]
    assert second == likelihoods(model, [[8]], [[11, 12]])[0]


@settings(max_examples=15)
@given(
    prompts=st.lists(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=9), max_size=9),
    batch_size=st.integers(1, 5),
    shared=st.integers(0, 90),
)
def test_any_prompts_in_any_batches(
    tiny: LoadedModel, prompts: list[list[int]], batch_size: int, shared: int
) -> None:
    prompts = [[*SYSTEM, *TOOLS][:shared] + prompt for prompt in prompts]
    found = answered(tiny, prompts, batch_size, [3] * len(prompts))
    assert {index: ids for index, (ids, _) in found.items()} == {
        index: plainly(tiny.model, prompt, 3) for index, prompt in enumerate(prompts)
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    return load_model(folder, ChatFormat())


def test_prompts_are_read_in_parts_of_bounded_size(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "READ_TOKENS", 16)
    monkeypatch.setattr(decoding, "READ_TOKENS_TOGETHER", 200)
    found = answered(tiny, PROMPTS, 8, [3] * len(PROMPTS))
    for index, prompt in enumerate(PROMPTS):
        assert found[index][0] == plainly(tiny.model, prompt, 3)


class Saying(nn.Module):
    """Says a given sequence of tokens, whatever it is asked, as a model with one layer would."""

    def __init__(self, said: Sequence[int]) -> None:
        super().__init__()
        self.said = said
        self.layers = [nn.Identity()]

    def __call__(self, ids: mx.array, cache: list[Any]) -> mx.array:
        (layer,) = cache
        states = mx.zeros((ids.shape[0], 1, ids.shape[1], 1))
        layer.update_and_fetch(states, states)
        position = int(layer.offset[0].item()) - 2
        token = self.said[min(max(position, 0), len(self.said) - 1)]
        return mx.zeros((*ids.shape, 50)).at[..., token].add(1.0)


def said_by(said: Sequence[int], limit: int) -> tuple[tuple[int, ...], str]:
    found: list[tuple[tuple[int, ...], str]] = []
    model = Saying(said)
    assert len(make_prompt_cache(model)) == 1
    answer_prompts(
        model,
        [[1, 2]],
        stop_ids=[49],
        max_tokens=[limit],
        batch_size=1,
        on_done=lambda _, answer: found.append((answer.ids, answer.finish_reason)),
    )
    (ended,) = found
    return ended


def test_an_answer_that_goes_in_circles_is_ended() -> None:
    ids, reason = said_by([*range(10, 20), *[3, 4, 5] * 400], 1000)
    assert reason == "loop" and 144 <= len(ids) < 200
    assert said_by([7] * 1000, 1000)[1] == "loop"


@pytest.mark.parametrize(
    "said",
    [
        [*range(30), 49],
        [*[3] * 100, 49],  # a ruler, a row of zeros
        [*[3, 4] * 60, 8, 49],  # a short table of the same cells
        [*(list(range(10, 30)) * 6), 49],  # six times the same line
        [*(token for row in range(40) for token in (5, 6, row % 40, 7)), 49],  # counted rows
    ],
)
def test_an_answer_that_repeats_itself_and_ends_is_not(said: list[int]) -> None:
    assert said_by(said, 2000) == (tuple(said[:-1]), "stop")


def test_limits_are_each_prompts_own(tiny: LoadedModel) -> None:
    limits, prompts = [2, 7, 4], [[5, 6], [7, 8], [9]]
    together = generate(tiny, prompts, max_tokens=limits)
    for prompt, limit, answer in zip(prompts, limits, together, strict=True):
        (alone,) = generate(tiny, [prompt], max_tokens=limit)
        assert answer == alone and len(answer.ids) <= limit


# --- likelihoods


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_a_likelihood_is_that_of_the_plain_model(loaded: LoadedModel, batch_size: int) -> None:
    answers = [[(index * 13 + k) % VOCABULARY for k in range(1 + index % 6)] for index in range(14)]
    found = likelihoods(loaded, PROMPTS, answers, batch_size=batch_size)
    for prompt, answer, each in zip(PROMPTS, answers, found, strict=True):
        logits = loaded.model(mx.array([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]
        logs = nn.log_softmax(logits, axis=-1)
        expected = [float(logs[place, token].item()) for place, token in enumerate(answer)]
        assert each.log_probabilities == pytest.approx(expected, abs=2e-4)
        assert each.loss == pytest.approx(-sum(expected) / len(expected), abs=2e-4)
        assert each.greedy is (mx.argmax(logits, axis=-1).tolist() == answer)


def test_what_a_model_says_is_its_greedy_answer(tiny: LoadedModel) -> None:
    said = [list(plainly(tiny.model, prompt, 4)) for prompt in PROMPTS]
    assert all(each.greedy for each in likelihoods(tiny, PROMPTS, said))
    wrong = [[*ids[:-1], (ids[-1] + 1) % VOCABULARY] for ids in said]
    assert not any(each.greedy for each in likelihoods(tiny, PROMPTS, wrong))


def test_the_built_in_model_reads_its_system_prompt_once(builtin_model: Path) -> None:
    """Every prompt of its template begins with the same 24 tokens."""
    from mlx_ft.engine.shared_prompts import shared_starts

    renderer = ChatRenderer.from_folder(builtin_model, ChatFormat())
    questions = ("Hello", "What is 2 + 2?", "Name a colour.", "Who are you?")
    prompts = [renderer.prompt_ids([{"role": "user", "content": text}]) for text in questions]
    starts, own = shared_starts(prompts)
    assert set(own) == {0} and len(starts[0].ids) >= 24
