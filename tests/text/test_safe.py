"""Nothing that steers a terminal, turns text around or looks like a credential gets through."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.text.safe import (
    REDACTED,
    REPLACEMENT,
    as_label,
    clean,
    excerpt,
    harm_of,
    has_control,
    one_line,
    printable,
    quoted,
    without_credentials,
)
from tests.support.run_folders import HOSTILE, TOKEN

EVERY_CHARACTER = [chr(point) for point in range(0x110000)]
DIRECTION = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
LINE_ENDS = "\n\r\x0b\x0c\x85\u2028\u2029"
STEERING = st.sampled_from(
    ["\x1b", "\x1b[", "\x9b", "\x1b]0;", "\x07", "\u202e", "\r", "\x00", "m"]
)


@given(st.lists(st.one_of(STEERING, st.text(max_size=8))).map("".join))
def test_clean_leaves_no_control_character_and_is_final(text: str) -> None:
    shown = clean(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n"]
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028")
    assert clean(shown) == shown
    shown.encode("utf-8")


@given(st.text(st.characters(categories=("L", "N", "P", "Sm")), max_size=40))
def test_clean_keeps_ordinary_text(text: str) -> None:
    assert clean(text) == text or REDACTED in clean(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]8;;https://example.org\x1b\\link\x1b]8;;\x07", "link"),
        ("a\x1b]0;never ended", "a0;never ended"),
        ("over\rwritten\r\nlines\x0bhere", "over\nwritten\nlines\nhere"),
        ("שלום \u202etxt.exe", "שלום txt.exe"),
        ("half \ud83d", "half \ufffd"),
        (f"key {TOKEN}!", f"key {REDACTED}!"),
        (f"hf_\x00{TOKEN[3:]}", REDACTED),
    ],
)
def test_clean_examples(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_one_line_and_excerpt_count_what_they_leave_out() -> None:
    assert one_line("a\n b\t c" + "d" * 50, 10) == "a b cdddd…"
    shown, left_out = excerpt(HOSTILE, 100)
    assert len(shown) == 100
    assert left_out == len(clean(HOSTILE)) - 100


def test_credentials_are_replaced_by_form_and_by_name() -> None:
    value = {"hf_token": "abc", "trained_tokens": 5, "list": [f"x {TOKEN}"], "tokenizer": "bpe"}
    expected = {
        "hf_token": REDACTED,
        "trained_tokens": 5,
        "list": [f"x {REDACTED}"],
        "tokenizer": "bpe",
    }
    assert without_credentials(value) == expected


def test_every_character_is_harmful_or_kept_by_the_one_table() -> None:
    for character in EVERY_CHARACTER:
        category = unicodedata.category(character)
        assert (harm_of(character) is not None) == (category in ("Cc", "Cf", "Cs")), character
        assert (harm_of(character) == "direction") == (character in DIRECTION), character


def test_a_terminal_is_shown_no_harmful_character_at_all() -> None:
    for character in EVERY_CHARACTER:
        harmful = unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\n\t"
        assert printable(character) == (REPLACEMENT if harmful else character)


def test_a_report_holds_no_control_no_surrogate_and_nothing_that_turns_text_around() -> None:
    for character in EVERY_CHARACTER:
        category, shown = unicodedata.category(character), clean(f"a{character}b")[1:-1]
        if character in LINE_ENDS:
            assert shown == "\n"
        elif category == "Cs":
            assert shown == REPLACEMENT
        elif character in DIRECTION or (category == "Cc" and character != "\t"):
            assert shown == ""
        else:
            assert shown == character


def test_yaml_may_hold_no_control_and_no_surrogate() -> None:
    for character in EVERY_CHARACTER:
        assert has_control(character) == (unicodedata.category(character) in ("Cc", "Cs"))
    assert not has_control("a\n\tb", kept="\n\t") and has_control("a\n\tb", kept="\n")


@given(st.text())
def test_what_a_message_quotes_is_one_printable_line(text: str) -> None:
    assert as_label(text).isprintable() and quoted(text, 60).isprintable()
    assert len(quoted(text, 60)) <= 63
    if text.isprintable():
        assert as_label(text) == text


def test_a_number_longer_than_python_prints_is_quoted_in_words() -> None:
    assert quoted(10**5000, 60) == "a very long number"
