"""Score one answer: a value from 0 to 1, what was understood, why, and the kind of failure.

Does: the checks that come before and after every scorer's own rule. Does not: generate, read
files, execute code, or import MLX. The text is a model's and may be anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_ft.evaluate.scorers.protocol import MAX_TEXT_CHARACTERS, Given, Score, Scorer, wrong
from mlx_ft.evaluate.signs import THINKING_TAGS
from mlx_ft.text.repetition import degenerate_reason

NOTHING_MORE = Given()


def score(
    scorer: Scorer,
    text: str,
    target: Mapping[str, Any],
    ids: Sequence[int] | None = None,
    given: Given = NOTHING_MORE,
) -> Score:
    """Judge `text` against `target` by the scorer's rule. Never raises, for any text.

    ids: the text's token ids where they are known; they only help to recognise a loop

    Before the rule: only white space is `empty`, a thinking tag is `thinking_leak`, over 32,768
    characters is `too_large`. After the rule: an answer that loops is a `loop`, unless it is
    exactly the answer wanted. A scorer that reads `nothing` is asked without these checks.
    """
    if scorer.reads == "nothing":
        return scorer.judge(text, target, given)
    # A call may consist of control tokens only, which the text leaves out.
    marks_count = scorer.reads == "raw" and given.raw is not None
    said = (given.raw or "") if marks_count else text
    if not said.strip():
        return wrong("empty", "nothing was said")
    if any(tag in text for tag in THINKING_TAGS):
        return wrong("thinking_leak", "thinks aloud, although thinking is off")
    if max(len(text), len(said)) > MAX_TEXT_CHARACTERS:
        return wrong("too_large", f"{len(text)} characters")
    judged = scorer.judge(text, target, given)
    if judged.value == 1.0 and scorer.leaves_no_room:
        return judged
    looping = degenerate_reason(text, ids) if text.strip() else None
    if looping is not None:
        return wrong("loop", looping, judged.answer)
    return judged


def ideal_answer(scorer: Scorer, target: Mapping[str, Any]) -> str | None:
    """Return a text that should score 1.0, or None where the target does not spell one."""
    return scorer.ideal(target)


def reference_of(scorer: Scorer, target: Mapping[str, Any]) -> str | None:
    """Return the text whose loss the scorer has to be given (`Given.reference_loss`), or None."""
    return scorer.reference(target)
