"""Every rule finds its failing rows, by line, and nothing in good ones."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.data.formats import Row, read_rows
from mlx_ft.data.lint import (
    LISTED_LINES,
    RULES,
    hits_json,
    lint,
)
from mlx_ft.data.sketch import bands_of, shingles_of, similarity
from mlx_ft.recipe_data import LintRule
from tests.data_room.rows import answer_of, good, row, sentence

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "data" / "code_mode"


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
