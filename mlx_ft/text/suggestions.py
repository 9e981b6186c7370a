""" "Did you mean X?": the only place that looks for a near name and words the question.

Does not: know which names there are.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence


def suggestion(
    word: str,
    candidates: Iterable[str],
    otherwise: str = "",
    *,
    cutoff: float = 0.6,
    written: Callable[[str], str] = str,
) -> str:
    """Return "did you mean X?" for the candidate nearest to an unknown word.

    otherwise: the text to return where no candidate is near
    cutoff: least likeness of a candidate, from 0 to 1 (difflib's ratio)
    written: how to write the candidate, such as with the folder that it is in
    """
    near = difflib.get_close_matches(word, list(candidates), n=1, cutoff=cutoff)
    return did_you_mean([written(each) for each in near], otherwise)


def did_you_mean(candidates: Sequence[str], otherwise: str) -> str:
    """Return the fix for an unknown name: the candidates as a question, or `otherwise`."""
    return f"did you mean {' or '.join(candidates)}?" if candidates else otherwise
