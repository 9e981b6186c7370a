"""Every rule finds its failing rows, by line, and nothing in good ones."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.data.lint import (
    LISTED_LINES,
    RULES,
    hits_json,
    lint,
)
from mlx_ft.data.rows import Row, read_rows
from mlx_ft.recipe.data import LintRule
from mlx_ft.text.near_duplicates import bands_of, shingles_of, similarity
from tests.support.chats import answer_of, good, row, sentence
from tests.support.paths import QUICKSTART


def hits(rows: Sequence[Row], name: str) -> list[int]:
    others = [rule.name for rule in RULES if rule.name != name]
    found = lint(rows, off=others)
    assert all(hit.rule == name for hit in found)
    return [line for hit in found for line in hit.lines]


BAD: dict[str, list[Row]] = {
    "cut-answers": [row(41, "what is it?", "It is a river that..."), row(42, "a", "so\u2026 ")],
    "one-length": [row(41 + n, f"q {n}", sentence(n, 80)[:400]) for n in range(6)],
    "copied-questions": [
        row(41, "Summarise this text about the garden.", "Summarise this text about the garden!"),
        row(42, sentence(3), sentence(3) + " island"),
    ],
    "constant-answers": [row(41 + n, f"question {n}", "No news.") for n in range(60)],
    "duplicates": [row(41, sentence(0, 12), answer_of(0))],
    "near-duplicates": [row(41, sentence(7, 50), "a"), row(42, sentence(7, 50) + " boat", "b")],
    "contradictions": [row(41, "Is it on?", "Yes."), row(42, "is it  on", "No.")],
    "some-think": [row(41, "a", "<think>hm</think>b"), row(42, "c", "d", reasoning_content="hm")],
    "template-marks": [row(41, "a", "b<|im_start|>user"), row(42, "[INST] a", "b")],
    "secrets": [row(41, "key?", "ghp_" + "a1B2" * 10), row(42, "AKIA" + "ABCD1234" * 2, "b")],
    "mojibake": [row(41, "a", "caf\u00c3\u00a9"), row(42, "a?", "it\u00e2\u20ac\u2122s")],
    "refusals": [
        row(41, "a", "I'm sorry, but I can't help with that."),
        row(42, "b", "As an AI language model, I have no feelings."),
    ],
}


def test_every_rule_is_here() -> None:
    assert get_args(LintRule) == tuple(rule.name for rule in RULES)
    assert set(BAD) == {rule.name for rule in RULES}
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("name", [rule.name for rule in RULES])
def test_a_rule_finds_its_rows_and_no_others(name: str) -> None:
    rows = good(40)
    assert hits(rows, name) == []
    wanted = [bad.line for bad in BAD[name]]
    if name == "near-duplicates":
        wanted = [42]  # the first of a family stays
    assert hits([*rows, *BAD[name]], name) == wanted[:LISTED_LINES]


def test_good_rows_have_no_findings_at_all() -> None:
    assert lint(good(300)) == []
    assert lint([]) == []


@pytest.mark.parametrize("split", ["train", "valid"])
def test_the_quickstarts_rows_have_no_findings(split: str) -> None:
    read = read_rows(QUICKSTART / f"{split}.jsonl")
    assert lint(read.rows) == []


def test_many_lines_are_counted_and_few_are_named() -> None:
    rows = [row(n + 1, f"question {n}", "so it goes...") for n in range(50)]
    (hit,) = lint(rows, off=[rule.name for rule in RULES if rule.name != "cut-answers"])
    assert (hit.count, hit.rows, len(hit.lines)) == (50, 50, LISTED_LINES)
    assert json.loads(json.dumps(hits_json([hit])))[0]["lines"] == list(range(1, 21))


def test_a_rule_that_is_off_says_nothing() -> None:
    rows = [*good(40), *BAD["cut-answers"]]
    assert lint(rows) != [] and lint(rows, off=["cut-answers"]) == []


def test_one_answer_of_the_longest_length_is_no_limit() -> None:
    rows = [*good(40), row(41, "a", "x" * 4000)]
    assert hits(rows, "one-length") == []


def test_a_doubled_row_is_no_near_duplicate_as_well() -> None:
    rows = [*good(40), *BAD["duplicates"]]
    assert hits(rows, "near-duplicates") == []


def test_a_shared_system_prompt_makes_no_near_duplicates() -> None:
    system = {"role": "system", "content": sentence(99, 400)}
    rows = [replace(one, messages=(system, *(one.messages or ()))) for one in good(60)]
    assert lint(rows) == []


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, I can't assist with that.",
        "I\u2019m sorry, but I can\u2019t help with that.",
        "I am so sorry, but I cannot fulfill this request.",
        "I'm unable to help with that.",
        "I am not able to assist you with this.",
        "Sorry, I can't do that.",
        "Sorry, but I cannot discuss this topic.",
        "Unfortunately, I won't be able to help you here.",
        "I apologize, but I cannot provide instructions for that.",
        "My apologies. I can't generate content of that kind.",
        "I simply cannot comply.",
        "As an AI language model, I have no feelings.",
        "As an AI, I have no opinion.",
        "I'm sorry, but as an AI assistant, I have no body.",
    ],
)
def test_a_refusal_is_one_in_any_words(answer: str) -> None:
    assert hits([*good(5), row(41, "a", answer)], "refusals") == [41]


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry to hear that. Here is what helps.",
        "I can't say which is better without the figures.",
        "I'm sorry, but there is no file of that name.",
        "Sorry, I can't find app.py; is it in another folder?",
        "Sorry, I misread it: the answer is 4.",
        "I can help with that.",
        "I can't help but notice a missing comma.",
        "As an AI engineer, you write tests.",
        "Unfortunately, it rains.",
        "She said: I'm sorry, I can't assist with that.",
    ],
)
def test_what_only_sounds_like_a_refusal_is_none(answer: str) -> None:
    assert hits([*good(5), row(41, "a", answer)], "refusals") == []


@pytest.mark.parametrize("end", [".", "?", "!", ")", "]", "}", "`", '"', "\u201d", ";"])
def test_whole_answers_of_one_length_are_not_cut(end: str) -> None:
    rows = [row(41 + n, f"q {n}", sentence(n, 80)[:399] + end) for n in range(20)]
    assert hits([*good(40), *rows], "one-length") == []


def test_one_answer_that_many_rows_share_is_not_cut() -> None:
    rows = [row(41 + n, f"q {n}", sentence(0, 80)[:400]) for n in range(8)]
    assert hits([*good(40), *rows], "one-length") == []


def test_marks_are_sought_in_messages_and_those_of_html_at_the_ends_alone() -> None:
    raw = Row(41, "text", None, "<s>[INST] hi [/INST] ho</s>", None, None)
    html = row(42, "How is text struck out?", "Write <s>old</s> in HTML.")
    assert hits([*good(5), raw, html], "template-marks") == []
    ends = [row(43, "a", "so it is.</s>\n"), row(44, "<s> b", "c")]
    assert hits([*good(5), *ends], "template-marks") == [43, 44]


@pytest.mark.parametrize(
    ("one", "other"),
    [("What is 3 + 4?", "What is 3 * 4?"), ("c -> d", "c <- d"), ("x = -1", "x = 1")],
)
def test_signs_are_part_of_a_question(one: str, other: str) -> None:
    assert hits([row(1, one, "7"), row(2, other, "12")], "contradictions") == []
    assert hits([row(1, one, "7"), row(2, other, "7")], "duplicates") == []


def test_other_tools_or_earlier_results_make_another_question() -> None:
    tools = ({"name": "f"},)
    plain = row(1, "what is the time?", "I do not know.")
    assert (
        hits([plain, replace(row(2, "what is the time?", "f()"), tools=tools)], "contradictions")
        == []
    )

    def called(line: int, argument: int, answer: str) -> Row:
        call = {"role": "assistant", "content": "", "tool_calls": [called_with(argument)]}
        result = {"role": "tool", "content": "ok"}
        one, last = row(line, "go on", answer).messages or ()
        return replace(plain, line=line, messages=(one, call, result, last))

    assert hits([called(1, 1, "a"), called(2, 2, "b")], "contradictions") == []
    assert hits([called(1, 1, "a"), called(2, 1, "b")], "contradictions") == [1, 2]


def called_with(argument: int) -> dict[str, Any]:
    return {"id": str(argument), "function": {"name": "f", "arguments": {"x": argument}}}


def test_calls_without_words_are_no_constant_answer() -> None:
    """The answer that counts is the last message: here a call of its own in every row."""
    rows = []
    for line in range(1, 61):
        asked = {"role": "user", "content": f"question {line}"}
        ready = {"role": "assistant", "content": "Ready."}
        call = {"role": "assistant", "content": "", "tool_calls": [called_with(line)]}
        rows.append(Row(line, "messages", (asked, ready, asked, call), None, None, None))
    assert hits(rows, "constant-answers") == []


def test_equal_rows_with_other_ids_of_calls_are_duplicates() -> None:
    def called(line: int) -> Row:
        call = {"id": f"call_{line}", "function": {"name": "f", "arguments": {}}}
        return row(line, "a", "", tool_calls=[call])

    assert hits([called(1), called(2)], "duplicates") == [2]


@given(st.integers(0, 10_000), st.integers(0, 3))
def test_families_are_found_whatever_the_words(seed: int, changed: int) -> None:
    """Up to three words of a hundred changed at the end: a similarity of 0.93 and more."""
    words = sentence(seed, 100).split()
    other = " ".join(words[: len(words) - changed] + ["boat"] * changed) + " moon"
    rows = [row(1, " ".join(words), "a"), row(2, other, "b")]
    one, two = shingles_of(" ".join(words)), shingles_of(other)
    assert similarity(one, two) > 0.9
    share = np.mean([x == y for x, y in zip(bands_of(one), bands_of(two), strict=True)])
    assert share > 0 and hits(rows, "near-duplicates") == [2]
