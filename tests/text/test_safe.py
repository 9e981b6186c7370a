"""Nothing that steers a terminal, turns text around or looks like a credential gets through."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.text.safe import REDACTED, clean, excerpt, one_line, without_credentials
from tests.support.run_folders import HOSTILE, TOKEN

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
