"""The keys that the target of each scorer may have.

Does: declare them, with the checks within one value. Does not: know the scorers' own keys.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from mlx_ft.evaluate.suite_keys import Filled
from mlx_ft.recipe.fields import Section
from mlx_ft.text.language import LANGUAGES
from mlx_ft.text.timed_regex import pattern_fault

Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Constant = str | bool | int | float
Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class WantedCall(Section):
    """One call of a wrapped_call target."""

    name: Identifier
    arguments: dict[Identifier, Constant]


class WrappedCallTarget(Section):
    """Target of wrapped_call."""

    calls: list[WantedCall] = Field(min_length=1)


class WantedToolCall(Section):
    """One call of a tool_call target."""

    name: Filled
    arguments: dict[str, Any]
    accepted: dict[str, list[Any]] = Field(default_factory=dict)
    optional: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _known_arguments(self) -> WantedToolCall:
        unknown = [n for n in (*self.accepted, *self.optional) if n not in self.arguments]
        if unknown:
            raise ValueError(f"{unknown[0]} is not one of its arguments")
        return self


class ToolCallTarget(Section):
    """Target of tool_call."""

    calls: list[WantedToolCall]


class JsonTarget(Section):
    """Target of json."""

    value: dict[str, Any] | list[Any] | None = None


class Rules(Section):
    """The rules of an instructions target."""

    min_words: Count | None = None
    max_words: Count | None = None
    min_sentences: Count | None = None
    max_sentences: Count | None = None
    paragraphs: Count | None = None
    bullets: Count | None = None
    numbered: Count | None = None
    includes: list[Filled] | None = Field(None, min_length=1)
    excludes: list[Filled] | None = Field(None, min_length=1)
    starts_with: Filled | None = None
    ends_with: Filled | None = None
    language: Filled | None = None
    case: Literal["lower", "upper"] | None = None
    json_: Literal[True] | None = Field(None, alias="json")
    no_commas: Literal[True] | None = None
    quoted: Literal[True] | None = None
    title: Literal[True] | None = None

    @model_validator(mode="after")
    def _some_and_known(self) -> Rules:
        if not self.model_fields_set:
            raise ValueError("name at least one rule")
        if self.language is not None and self.language not in LANGUAGES:
            raise ValueError(f"language is none of {', '.join(LANGUAGES)}")
        return self


class InstructionsTarget(Section):
    """Target of instructions."""

    rules: Rules


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
        fault = pattern_fault(self.pattern)
        if fault is not None:
            raise ValueError(f"the pattern is no regular expression ({fault})")
        return self


class NumericTarget(Section):
    """Target of numeric."""

    number: Number


class ChoiceTarget(Section):
    """Target of choice."""

    choice: Filled


class SimilarityTarget(Section):
    """Target of similarity."""

    references: list[Filled] = Field(min_length=1)


class PerplexityTarget(Section):
    """Target of perplexity."""

    reference: Filled
    max_perplexity: float = Field(ge=1, allow_inf_nan=False)


class SeveralTarget(Section):
    """Target of any_of and all_of: one target for each of their scorers."""

    of: list[dict[str, Any]]
