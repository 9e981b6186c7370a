"""Judge one answer: a value from 0 to 1, what was understood, why, and which kind of wrong it is.

Does: pure functions from (scorer, text, target) to a Score; what goes for every scorer, and those
that combine others. The rule of each is its docstring (`text.py`, `tool_calls.py`,
`structured.py`, `instructions.py`). Does not: generate, read files, execute code, or import MLX.
Text is a model's and may be anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mlx_ft.evaluate.scorers.protocol import MAX_TEXT_CHARACTERS, Given, Score, Scorer, wrong
from mlx_ft.evaluate.scorers.text import Perplexity
from mlx_ft.evaluate.scorers.tool_calls import ToolCall
from mlx_ft.evaluate.signs import THINKING_TAGS
from mlx_ft.text.repetition import degenerate_reason

NOTHING_MORE = Given()


@dataclass(frozen=True)
class AnyOf:
    """The best of several scorers. Target: {"of": [...]}, one target for each, in their order."""

    scorers: tuple[Scorer, ...]
    leaves_no_room: ClassVar[bool] = False

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        return max(_judged(self.scorers, text, target, given), key=lambda each: each.value)

    def ideal(self, target: Mapping[str, Any]) -> str | None:
        spelled = (s.ideal(t) for s, t in zip(self.scorers, target["of"], strict=True))
        return next((text for text in spelled if text is not None), None)


@dataclass(frozen=True)
class AllOf:
    """The worst of several scorers. Target: {"of": [...]}, one target for each, in their order."""

    scorers: tuple[Scorer, ...]
    leaves_no_room: ClassVar[bool] = False

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        return min(_judged(self.scorers, text, target, given), key=lambda each: each.value)

    def ideal(self, target: Mapping[str, Any]) -> str | None:
        pairs = list(zip(self.scorers, target["of"], strict=True))
        spelled = [text for s, t in pairs if (text := s.ideal(t)) is not None]
        whole = (
            text for text in spelled if all(s.judge(text, t, _SURE).value == 1 for s, t in pairs)
        )
        return next(whole, None)


_SURE = Given(reference_loss=0.0)


def _judged(
    scorers: Sequence[Scorer], text: str, target: Mapping[str, Any], given: Given
) -> list[Score]:
    return [s.judge(text, t, given) for s, t in zip(scorers, target["of"], strict=True)]


def score(
    scorer: Scorer,
    text: str,
    target: Mapping[str, Any],
    ids: Sequence[int] | None = None,
    given: Given = NOTHING_MORE,
) -> Score:
    """Judge `text` against `target` by the scorer's rule.

    `ids` are the text's token ids where they are known; they only help to tell a loop. Never raises
    for any text. Before the rule: nothing but space is `empty`, a thinking tag `thinking_leak`,
    over 32,768 characters `too_large`; after it, an answer that loops is a `loop`, unless it is
    exactly what was wanted. A scorer of the model's own probabilities looks at no text.
    """
    if isinstance(scorer, Perplexity):
        return scorer.judge(text, target, given)
    # A call may consist of control tokens only, which the text leaves out.
    marks_count = isinstance(scorer, ToolCall | AnyOf | AllOf) and given.raw is not None
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
    if isinstance(scorer, Perplexity):
        return str(target["reference"])
    if isinstance(scorer, AnyOf | AllOf):
        found = (reference_of(s, t) for s, t in zip(scorer.scorers, target["of"], strict=True))
        return next((text for text in found if text is not None), None)
    return None
