"""Loops are found whatever stands before them; structured and ordinary text is left alone."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.text.repetition import (
    MAX_PERIOD_TOKENS,
    MIN_LOOP_COPIES,
    MIN_LOOP_TOKENS,
    degenerate_reason,
    token_loop,
)

HAMLET = (
    "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer the "
    "slings and arrows of outrageous fortune, or to take arms against a sea of troubles and by "
    "opposing end them. To die, to sleep, no more; and by a sleep to say we end the heart-ache and "
    "the thousand natural shocks that flesh is heir to: 'tis a consummation devoutly to be wished."
)
FINE = {
    "yes": "Yes.",
    "one character": "7",
    "prose": HAMLET,
    "long prose": HAMLET * 2,
    "tool call": 'execute_code("""read_file(path="src/main.py")""")',
    "numbered list": "\n".join(f"{n}. Item number {n}" for n in range(1, 60)),
    "bulleted list": "\n".join(f"- {name}" for name in ("red", "green", "blue", "cyan", "pink")),
    "capitals": "\n".join(f"The capital of country {n} is town {n}." for n in range(30)),
    "json records": json.dumps(
        [{"id": n, "name": f"user {n}", "active": True} for n in range(200)]
    ),
    "indented json": json.dumps(
        [{"id": n, "tags": None, "ok": False} for n in range(99)], indent=4
    ),
    "array of booleans": json.dumps([True] * 40),
    "alternating booleans": json.dumps([True, False] * 40),
    "matrix of zeros": json.dumps([[0] * 10 for _ in range(30)]),
    "table": "| name | ok |\n|---|---|\n" + "\n".join(f"| row {n} | yes |" for n in range(80)),
    "table of one word": "| a | b |\n" + "| no | no |\n" * 20,
    "csv": "\n".join(f"2024-01-{n % 28 + 1:02d},0,0,0,0" for n in range(100)),
    "ruler": "Title\n" + "=" * 120 + "\n" + "-" * 79,
    "numbers": ", ".join(map(str, range(1000))),
    "hexadecimal zeros": "0x" + "0" * 64,
    "code": "\n".join(
        f"    parser.add_argument('--x{n}', type=int, default={n})" for n in range(60)
    ),
    "deep indentation": "\n".join(" " * (4 * n) + f"if x{n}:" for n in range(40)),
    "laughter": "Ha ha ha ha ha, very funny!",
    "seven words": "no " * 7,
    "five phrases": "let it be " * 5,
    "chorus": "Row, row, row your boat, gently down the stream. " * 3,
    "hesitation": "Hmmmmmmm... sooooooo, let me see!!!!!",
    "spaces": "a" + " " * 400 + "b",
    "chinese": "今天天气很好\uff0c我们一起去公园散步吧。",
}
LOOPS = {
    "hotep": "The answer is " + "Hotep " * 8,
    "zertrueten": "zertrüten " * 20,
    "mixed case": "Hotep hotep HOTEP hotep Hotep hotep hotep hotep",
    "sorry": "I am sorry. " * 6,
    "apostrophe": "I don't know, " * 6,
    "phrase in the middle": "Well: " + "and then the " * 7 + "that was all.",
    "two words": "of the " * 6,
    "words with commas": "Hotep, " * 40,
    "long sentence": "The quick brown fox jumps over the lazy dog and runs far away from here. "
    * 20,
    "exclamation marks": "Great" + "!" * 40,
    "letters": "a" * 40,
    "dots": "." * 400,
    "chinese": "我很抱歉\uff0c" * 80,
}


@pytest.mark.parametrize("name", FINE)
def test_ordinary_and_structured_text_is_not_degenerate(name: str) -> None:
    text = FINE[name]
    assert degenerate_reason(text, None) is None
    assert degenerate_reason(text, []) is None


@pytest.mark.parametrize("name", LOOPS)
def test_loops_of_text_are_found(name: str) -> None:
    reason = degenerate_reason(LOOPS[name], None)
    assert reason is not None and reason != "empty"


@pytest.mark.parametrize("text", ["", " ", "\n\t\n", "\u2003"])
def test_nothing_but_space_is_empty(text: str) -> None:
    assert degenerate_reason(text, None) == "empty"
    assert degenerate_reason(text, [5]) == "empty"


@st.composite
def loops(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """A block of tokens and a loop of it that is just long enough, cut anywhere at its start."""
    block = draw(st.lists(st.integers(0, 3), min_size=1, max_size=MAX_PERIOD_TOKENS))
    copies = max(MIN_LOOP_COPIES, -(-MIN_LOOP_TOKENS // len(block)))
    extra = draw(st.integers(0, len(block) - 1))
    return block, (block * (copies + 1))[len(block) - extra :]


@given(loops(), st.lists(st.integers(0, 50_000), max_size=40))
def test_a_loop_at_the_end_is_found_whatever_stands_before_it(
    loop: tuple[list[int], list[int]], before: list[int]
) -> None:
    block, tail = loop
    found = token_loop(before + tail)
    assert found is not None
    period, tokens = found
    assert period <= len(block) and tokens >= MIN_LOOP_TOKENS
    ids = (before + tail)[-tokens:]
    assert ids[period:] == ids[:-period], "the tokens named do have that period"
    assert degenerate_reason("some text", before + tail) is not None


@given(st.lists(st.integers(0, 2), max_size=200))
def test_token_loop_agrees_with_the_definition(ids: list[int]) -> None:
    def covered(period: int) -> int:
        lengths = range(period, len(ids) + 1)
        return max(
            n for n in lengths if ids[len(ids) - n + period :] == ids[len(ids) - n : -period]
        )

    expected = any(
        covered(period) >= max(MIN_LOOP_TOKENS, MIN_LOOP_COPIES * period)
        for period in range(1, min(MAX_PERIOD_TOKENS, len(ids)) + 1)
    )
    assert (token_loop(ids) is not None) == expected


@given(st.permutations(range(300)))
def test_tokens_that_never_repeat_are_no_loop(ids: list[int]) -> None:
    assert token_loop(ids) is None


def test_a_finished_structure_is_no_loop() -> None:
    row = [7, 8, 9, 10]
    assert token_loop(row * 20) is not None
    assert token_loop([*row * 20, 11]) is None
    assert token_loop(row * 11) is None, "44 tokens are too few to tell"
    assert token_loop([*range(60)] * 2) is None, "said twice is not a loop"
    assert token_loop([*range(60)] * 3) == (60, 180)
    assert token_loop([*range(MAX_PERIOD_TOKENS + 1)] * 4) is None


WORDS = st.text(alphabet="abcdefghijklmnopqrstuvwxyzäöüß", min_size=1, max_size=8)


@given(st.lists(WORDS, unique=True, min_size=1, max_size=40))
def test_different_words_are_never_degenerate(words: list[str]) -> None:
    assert degenerate_reason(" ".join(words), None) is None


@given(
    st.lists(WORDS, unique=True, min_size=1, max_size=6),
    st.text(max_size=60),
    st.text(max_size=60),
)
def test_a_phrase_said_often_is_found_anywhere(phrase: list[str], before: str, after: str) -> None:
    looped = " ".join(phrase * 9)
    assert degenerate_reason(f"{before} {looped} {after}", None) is not None


@given(st.text(max_size=400), st.none() | st.lists(st.integers(0, 9), max_size=300))
def test_any_text_gets_an_answer(text: str, ids: list[int] | None) -> None:
    reason = degenerate_reason(text, ids)
    assert reason is None or reason
    assert (reason == "empty") == (not text.strip())
