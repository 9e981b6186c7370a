"""Degeneration signs of an answer, whatever the question and the scorer.

Does: find each of `SIGNS` in an answer; each errs towards silence. The rules for loops are in
`text/repetition.py`.
Does not: score, or decide which signs matter to a suite.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlx_ft.text.language import NAMED_LANGUAGE, language_of
from mlx_ft.text.repetition import degenerate_reason

THINKING_TAGS = ("<think>", "</think>")
SIGNS = ("empty", "loop", "cut", "leaked_token", "open_thinking", "wrong_language")
# A healthy model has none of these; it may well be cut by a small max_tokens, and it may be asked
# to answer in another language in a way that is not understood here.
SICK = frozenset(("empty", "loop", "leaked_token", "open_thinking"))

# Marks of a chat's turns, which no reader should ever see. Tool calls have marks of their own.
_TURN_MARK = re.compile(
    r"<\|(?!tool|channel|python_tag)[A-Za-z_]{1,32}\|>|<\uff5c[^<>\uff5c]{1,40}\uff5c>|"
    r"</?s>|\[/?INST\]|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
)
MAX_SEARCHED_CHARACTERS = 65_536


def signs_of(
    text: str,
    raw: str,
    ids: Sequence[int] | None,
    finish_reason: str,
    user_said: str = "",
    enable_thinking: bool = False,
) -> list[str]:
    """Return the signs seen in an answer, in the order of SIGNS.

    text: the answer without control tokens.
    raw: the same with them.
    ids: its tokens; None where they are not those of the text.
    user_said: the last message to the model.

    An answer that is cut inside its thinking is `open_thinking`. Without thinking mode, so is one
    with a tag that is opened and not closed.
    """
    seen = set()
    raw, text = raw[:MAX_SEARCHED_CHARACTERS], text[:MAX_SEARCHED_CHARACTERS]
    reason = degenerate_reason(text, ids)
    if reason is not None:
        seen.add("empty" if not text.strip() else "loop")
    if finish_reason == "loop":
        seen.add("loop")
    if finish_reason == "length":
        seen.add("cut")
    if _TURN_MARK.search(raw) or _TURN_MARK.search(text):
        seen.add("leaked_token")
    opened, closed = (raw.rfind(tag) for tag in THINKING_TAGS)
    never_closed = enable_thinking and closed < 0 and finish_reason in ("length", "loop")
    if opened > closed or never_closed:
        seen.add("open_thinking")
    spoken = language_of(text)
    asked = language_of(user_said)
    if spoken and asked and spoken != asked and not NAMED_LANGUAGE.search(user_said):
        seen.add("wrong_language")
    return [sign for sign in SIGNS if sign in seen]
