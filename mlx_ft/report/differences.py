"""Word-level diff of two outputs.

Does not: escape, or mark outputs that have little in common (everything would be marked).
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher

WORD = re.compile(r"\s+|\w+|[^\w\s]")
# Share of words in common below which two outputs are simply different.
LEAST_ALIKE = 0.4


def marked(before: str, text: str) -> list[tuple[str, bool]]:
    """Return `text` in pieces, each with whether it differs from `before`.

    Joined, the pieces are `text`. If the two are alike or have little in common, it is one unmarked
    piece.
    """
    old, new = WORD.findall(before), WORD.findall(text)
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    if before == text or matcher.quick_ratio() < LEAST_ALIKE or matcher.ratio() < LEAST_ALIKE:
        return [(text, False)]
    pieces = [
        ("".join(new[start:end]), tag != "equal")
        for tag, _, _, start, end in matcher.get_opcodes()
        if end > start
    ]
    return pieces or [(text, False)]
