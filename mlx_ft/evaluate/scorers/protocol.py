"""Score, Scorer: what a scorer is given and what it returns.

Does not: judge anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

MAX_TEXT_CHARACTERS = 32_768
FAILURES = (
    "empty",
    "loop",
    "thinking_leak",
    "too_large",
    "wrong_wrapper",
    "extra_text",
    "wrong_tool",
    "wrong_argument",
    "wrong_type",
    "missing_argument",
    "unexpected_argument",
    "extra_call",
    "missing_call",
    "wrong_order",
    "unparsable",
    "prose",
    "forbidden_text",
    "too_short",
    "too_long",
    "wrong_answer",
    "no_answer",
    "ambiguous_answer",
    "too_slow",
    "not_json",
    "schema",
    "wrong_field",
    "missing_field",
    "unexpected_field",
    "instruction",
    "dissimilar",
    "unlikely",
)


@dataclass(frozen=True)
class Score:
    """Result of judging one answer.

    value: from 0 to 1
    answer: the part of the text that was understood as the answer
    reason: why the value is what it is, in words
    failure: one of FAILURES; None exactly when the value is 1
    """

    value: float
    answer: str
    reason: str
    failure: str | None

    def __post_init__(self) -> None:
        assert 0 <= self.value <= 1
        assert (self.failure is None) == (self.value == 1.0)
        assert self.failure is None or self.failure in FAILURES


@dataclass(frozen=True)
class Given:
    """Facts about an answer besides its text, for the scorers that need them.

    raw: the text with its control tokens (None: there are none)
    tools: the tools that the prompt declared, as JSON schemas
    reference_loss: mean loss of the target's reference after the prompt, its stop token included
        (nats a token; None: it was not measured)
    """

    raw: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    reference_loss: float | None = None


class Scorer(Protocol):
    """A scorer: its configuration, and a pure function from a text and its target to a Score.

    leaves_no_room: a text with the full score cannot loop, by the rule itself
    reads: what the rule looks at: the `text`, the text with its control tokens (`raw`), or
        `nothing` but the model's own probabilities
    """

    leaves_no_room: ClassVar[bool] = False
    reads: ClassVar[Literal["text", "raw", "nothing"]] = "text"

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        """Return the score of any text that is not empty and has at most 32,768 characters."""
        ...

    def ideal(self, target: Mapping[str, Any]) -> str | None:
        """Return a text that scores 1.0, or None where the target does not spell one."""
        return None

    def reference(self, target: Mapping[str, Any]) -> str | None:
        """Return the text whose loss the rule needs (`Given.reference_loss`), or None."""
        return None


def wrong(failure: str, reason: str, answer: str = "", value: float = 0.0) -> Score:
    """Return a score below 1, with its kind of failure."""
    return Score(value, answer, reason, failure)


def right(answer: str, reason: str = "right") -> Score:
    """Return the full score."""
    return Score(1.0, answer, reason, None)
