"""Is this output degenerate (loops, filler, empty)? Cheap rules on token ids and characters.

Does: name the reason, or say that none was found.
Does not: judge whether an answer is right, or import anything heavy. Every threshold errs towards
silence: lists, JSON, tables and code repeat themselves for good reasons.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

# Loop at the end of the token ids: the values of vllm-mlx pull request 723.
MAX_PERIOD_TOKENS = 128
MIN_LOOP_COPIES = 3
MIN_LOOP_TOKENS = 48
# An answer is ended in the middle only when it has looped this many times as long: a row of zeros
# or of dashes may be what was asked for, and end.
CERTAIN = 3

# Loops of words: the counts of vllm-mlx pull request 65 (8 and 6), taken on words.
MIN_SAME_WORDS = 8
MIN_SAME_PHRASES = 6
MAX_PHRASE_WORDS = 6

# Runs of one character. Rulers of dashes, padding and long numbers are ordinary text.
MIN_CHARACTER_RUN = 32
MIN_FILLER_RUN = 200

# Whisper's transcribe.py calls a compression ratio over 2.4 failed. That is for speech: measured,
# prose has 1.4, JSON of ten records 4.3, long tables up to 17, a matrix of zeros 50. So it is
# looked at only in prose, where "I am sorry. " over 200 characters has 8.7 and a list of capital
# cities 2.6, and only through a window, since the ratio grows with the length.
MIN_COMPRESSED_CHARACTERS = 200
COMPRESSION_WINDOW_CHARACTERS = 2000
MIN_LETTER_SHARE = 0.75
MAX_COMPRESSION_RATIO = 8.0

_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")
_CHARACTER_RUN = re.compile(rf"(\S)\1{{{MIN_CHARACTER_RUN - 1},}}")
_SENTENCE_MARKS = frozenset(".,;:!?'-\u2019\u2013\u2014\u2026\u3001\u3002\uff0c")
_STRUCTURE_MARKS = frozenset('[]{}<>|"=/\\_#`')


def degenerate_reason(text: str, ids: Sequence[int] | None) -> str | None:
    """Return why an output is degenerate, in words, or None.

    text: the output without control tokens.
    ids: its token ids without the stop token, or None if unknown.
    Rules: empty; a loop at the end of the ids; one character, word or phrase repeated; prose that
    compresses like a loop.
    """
    if not text.strip():
        return "empty"
    return (
        (_token_loop_reason(ids) if ids is not None else None)
        or _character_run_reason(text)
        or _word_loop_reason(text)
        or _compression_reason(text)
    )


def token_loop(ids: Sequence[int]) -> tuple[int, int] | None:
    """Return (period, tokens) of a loop at the end of `ids`, or None.

    A loop is a block of at most 128 tokens repeated at least 3 times, over at least 48 tokens; the
    oldest copy beyond these may be a part of one. The rule and values of vllm-mlx pull request 723.
    A structure that was finished ends in other tokens than it repeats, so it is no loop.
    """
    for period in range(1, min(MAX_PERIOD_TOKENS, len(ids) // MIN_LOOP_COPIES) + 1):
        covered = period
        while covered < len(ids) and ids[-covered - 1] == ids[period - covered - 1]:
            covered += 1
        if covered >= max(MIN_LOOP_TOKENS, MIN_LOOP_COPIES * period):
            return period, covered
    return None


def goes_in_circles(ids: Sequence[int]) -> bool:
    """Return whether an answer that has come this far may be ended, because it only repeats itself:
    a loop of at least 9 copies over at least 144 tokens.
    """
    loop = token_loop(ids[-CERTAIN * MIN_LOOP_COPIES * MAX_PERIOD_TOKENS :])
    if loop is None:
        return False
    period, tokens = loop
    return tokens >= CERTAIN * max(MIN_LOOP_TOKENS, MIN_LOOP_COPIES * period)


def _token_loop_reason(ids: Sequence[int]) -> str | None:
    loop = token_loop(ids)
    if loop is None:
        return None
    period, tokens = loop
    return f"the last {tokens} tokens repeat a block of {period}"


def _character_run_reason(text: str) -> str | None:
    for match in _CHARACTER_RUN.finditer(text):
        character, run = match.group(1), len(match.group())
        if run >= MIN_FILLER_RUN or character.isalpha() or character in "!?":
            return f"{character!r} {run} times in a row"
    return None


def _word_loop_reason(text: str) -> str | None:
    """Find a word said 8 times in a row, or a phrase of 2-6 words 6 times in a row."""
    tokens = _WORD_OR_MARK.findall(text.lower())
    for period in range(1, 2 * MAX_PHRASE_WORDS + 1):
        start = 0
        for index in range(period, len(tokens) + 1):
            if index < len(tokens) and tokens[index] == tokens[index - period]:
                continue
            copies = (index - start) // period
            if copies >= min(MIN_SAME_WORDS, MIN_SAME_PHRASES):
                unit = tokens[start : start + period]
                if copies >= _copies_needed(unit):
                    return f"{' '.join(unit)!r} {copies} times in a row"
            start = index - period + 1
    return None


def _copies_needed(unit: Sequence[str]) -> float:
    """Return how many copies of a unit of words and marks make a loop; infinity if none do.

    Digits and all marks that are not a sentence's (brackets, bars, double quotes) mean structure.
    With marks it takes three different words, so that `[true, true, true]` is no loop.
    """
    words = [token for token in unit if token[0].isalpha()]
    marks = [token for token in unit if not token[0].isalpha()]
    if not _SENTENCE_MARKS.issuperset(marks) or not 1 <= len(words) <= MAX_PHRASE_WORDS:
        return float("inf")
    if len(unit) == 1:
        return MIN_SAME_WORDS
    return MIN_SAME_PHRASES if len(set(words)) >= (3 if marks else 2) else float("inf")


def _compression_reason(text: str) -> str | None:
    window = " ".join(text.split())[-COMPRESSION_WINDOW_CHARACTERS:]
    letters = sum(character.isalpha() or character == " " for character in window)
    is_prose = _STRUCTURE_MARKS.isdisjoint(window) and letters >= MIN_LETTER_SHARE * len(window)
    if len(window) < MIN_COMPRESSED_CHARACTERS or not is_prose:
        return None
    raw = window.encode("utf-8", "replace")
    ratio = len(raw) / len(zlib.compress(raw))
    return f"compresses {ratio:.0f} to 1" if ratio > MAX_COMPRESSION_RATIO else None
