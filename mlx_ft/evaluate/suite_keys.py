"""The keys that a suite's two files may have, and which target belongs to which scorer.

Does: declare them, with the checks within one value. Does not: read files or judge answers.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from mlx_ft.evaluate import scorers
from mlx_ft.recipe_values import Section

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,79}$"
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Filled = Annotated[str, StringConstraints(min_length=1)]
# These are printed in tables, so control characters (ANSI sequences) have no place in them.
Printable = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,120}$")]
Constant = str | bool | int | float


class SuiteFile(Section):
    """The keys of a suite's YAML file."""

    name: str = Field(pattern=NAME)
    description: str = ""
    samples: Filled
    scorer: dict[str, Any]
    max_tokens: int = Field(ge=1)
    enable_thinking: bool = False
    stop: list[Filled] = Field(default_factory=list)
    tags: list[Printable] = Field(default_factory=list)

    @model_validator(mode="after")
    def _may_think(self) -> SuiteFile:
        if self.enable_thinking and any(tag in self.stop for tag in scorers.THINKING_TAGS):
            raise ValueError("enable_thinking is true, but stop ends every answer that thinks")
        return self


class Message(Section):
    """One chat message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content or tool_calls")
        return self


class SampleLine(Section):
    """The keys of one line of a suite's JSONL file."""

    id: Printable
    category: Printable = "general"
    messages: list[Message] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    target: dict[str, Any]
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _model_speaks_next(self) -> SampleLine:
        if self.messages[-1].role not in ("user", "tool"):
            raise ValueError("the last message must be of the user or of a tool")
        return self


class WrappedCallKeys(Section):
    """`scorer: {name: wrapped_call, ...}`"""

    name: Literal["wrapped_call"]
    wrapper: Identifier
    tools: dict[Identifier, list[Identifier]] = Field(min_length=1)

    def build(self) -> scorers.WrappedCall:
        return scorers.WrappedCall(self.wrapper, {k: tuple(v) for k, v in self.tools.items()})


class TalkKeys(Section):
    """`scorer: {name: talk, ...}`"""

    name: Literal["talk"]
    forbid: list[Filled] = Field(default_factory=list)

    def build(self) -> scorers.Talk:
        return scorers.Talk(tuple(self.forbid))


class ExactKeys(Section):
    """`scorer: {name: exact, ...}`"""

    name: Literal["exact"]
    ignore_case: bool = False

    def build(self) -> scorers.Exact:
        return scorers.Exact(self.ignore_case)


class ContainsKeys(Section):
    """`scorer: {name: contains, ...}`"""

    name: Literal["contains"]
    ignore_case: bool = True

    def build(self) -> scorers.Contains:
        return scorers.Contains(self.ignore_case)


class RegexKeys(Section):
    """`scorer: {name: regex, ...}`"""

    name: Literal["regex"]
    ignore_case: bool = False

    def build(self) -> scorers.Regex:
        return scorers.Regex(self.ignore_case)


class ChoiceKeys(Section):
    """`scorer: {name: choice, ...}`"""

    name: Literal["choice"]
    choices: list[Filled] = Field(min_length=2)

    def build(self) -> scorers.Choice:
        return scorers.Choice(tuple(self.choices))


class WantedCall(Section):
    """One call of a wrapped_call target."""

    name: Identifier
    arguments: dict[Identifier, Constant]


class WrappedCallTarget(Section):
    """Target of wrapped_call."""

    calls: list[WantedCall] = Field(min_length=1)


class TalkTarget(Section):
    """Target of talk."""

    any_of: list[Filled] = Field(default_factory=list)
    min_words: int = Field(1, ge=1)
    max_words: int = Field(120, ge=1)

    @model_validator(mode="after")
    def _range(self) -> TalkTarget:
        if self.min_words > self.max_words:
            raise ValueError("min_words is greater than max_words")
        return self


class ExactTarget(Section):
    """Target of exact."""

    text: Filled


class ContainsTarget(Section):
    """Target of contains."""

    any_of: list[Filled] = Field(default_factory=list)
    all_of: list[Filled] = Field(default_factory=list)

    @model_validator(mode="after")
    def _something(self) -> ContainsTarget:
        if not self.any_of and not self.all_of:
            raise ValueError("any_of and all_of are both empty")
        return self


class RegexTarget(Section):
    """Target of regex."""

    pattern: Filled

    @model_validator(mode="after")
    def _compiles(self) -> RegexTarget:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"the pattern is no regular expression ({error})") from error
        return self


class ChoiceTarget(Section):
    """Target of choice."""

    choice: Filled


ScorerKeys = WrappedCallKeys | TalkKeys | ExactKeys | ContainsKeys | RegexKeys | ChoiceKeys
SCORERS: dict[str, tuple[type[ScorerKeys], type[Section]]] = {
    "wrapped_call": (WrappedCallKeys, WrappedCallTarget),
    "talk": (TalkKeys, TalkTarget),
    "exact": (ExactKeys, ExactTarget),
    "contains": (ContainsKeys, ContainsTarget),
    "regex": (RegexKeys, RegexTarget),
    "choice": (ChoiceKeys, ChoiceTarget),
}


def target_fault(scorer: ScorerKeys, target: Section) -> str | None:
    """Return what is wrong with a target under this scorer although its keys are right, or None."""
    if isinstance(target, ChoiceTarget) and isinstance(scorer, ChoiceKeys):
        known = target.choice in scorer.choices
        return None if known else f"{target.choice!r} is not one of {', '.join(scorer.choices)}"
    if isinstance(target, WrappedCallTarget) and isinstance(scorer, WrappedCallKeys):
        for call in target.calls:
            if call.name not in scorer.tools:
                return f"target calls {call.name}, which is not one of the scorer's tools"
            unknown = [name for name in call.arguments if name not in scorer.tools[call.name]]
            if unknown:
                return f"target gives {call.name} the argument {unknown[0]}, which it does not have"
    return None
