"""The keys that each scorer may have in a suite, and which targets belong to it: the closed list.

Does: declare them, with the checks within one value, and build the scorers (`suite_targets.py` has
the targets' keys). Does not: read files or judge answers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from mlx_ft.evaluate import scorers_json, scorers_rules, scorers_text
from mlx_ft.evaluate.json_schema import schema_faults
from mlx_ft.evaluate.scorers import AllOf, AnyOf, Scorer
from mlx_ft.evaluate.scorers_calls import ToolCall, WrappedCall
from mlx_ft.evaluate.suite_keys import Filled
from mlx_ft.evaluate.suite_targets import (
    ChoiceTarget,
    ContainsTarget,
    ExactTarget,
    Identifier,
    InstructionsTarget,
    JsonTarget,
    NumericTarget,
    PerplexityTarget,
    RegexTarget,
    SeveralTarget,
    SimilarityTarget,
    TalkTarget,
    ToolCallTarget,
    WrappedCallTarget,
)
from mlx_ft.evaluate.tool_formats import format_names
from mlx_ft.recipe.fields import Section
from mlx_ft.recipe.strict_yaml import key_path

Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class WrappedCallKeys(Section):
    """`scorer: {name: wrapped_call, ...}`"""

    name: Literal["wrapped_call"]
    wrapper: Identifier
    tools: dict[Identifier, list[Identifier]] = Field(min_length=1)

    def build(self) -> Scorer:
        return WrappedCall(self.wrapper, {k: tuple(v) for k, v in self.tools.items()})


class ToolCallKeys(Section):
    """`scorer: {name: tool_call, ...}`"""

    name: Literal["tool_call"]
    format: str = "auto"
    order: Literal["any", "given"] = "any"
    loose_strings: bool = False

    @model_validator(mode="after")
    def _known_format(self) -> ToolCallKeys:
        if self.format not in format_names():
            raise ValueError(f"format is none of {', '.join(format_names())}")
        return self

    def build(self) -> Scorer:
        return ToolCall(self.format, self.order, self.loose_strings)


class JsonKeys(Section):
    """`scorer: {name: json, ...}`"""

    name: Literal["json"]
    form: dict[str, Any] | None = Field(None, alias="schema")
    ignore: list[Filled] = Field(default_factory=list)
    tolerance: Size = 0.0
    ignore_case: bool = False

    @model_validator(mode="after")
    def _known_keywords(self) -> JsonKeys:
        faults = list(schema_faults(self.form)) if self.form is not None else []
        if faults:
            raise ValueError("; ".join(faults[:5]))
        return self

    def build(self) -> Scorer:
        return scorers_json.Json(self.form, tuple(self.ignore), self.tolerance, self.ignore_case)


class InstructionsKeys(Section):
    """`scorer: {name: instructions}`"""

    name: Literal["instructions"]

    def build(self) -> Scorer:
        return scorers_rules.Instructions()


class TalkKeys(Section):
    """`scorer: {name: talk, ...}`"""

    name: Literal["talk"]
    forbid: list[Filled] = Field(default_factory=list)

    def build(self) -> Scorer:
        return scorers_text.Talk(tuple(self.forbid))


class ExactKeys(Section):
    """`scorer: {name: exact, ...}`"""

    name: Literal["exact"]
    ignore_case: bool = False

    def build(self) -> Scorer:
        return scorers_text.Exact(self.ignore_case)


class ContainsKeys(Section):
    """`scorer: {name: contains, ...}`"""

    name: Literal["contains"]
    ignore_case: bool = True

    def build(self) -> Scorer:
        return scorers_text.Contains(self.ignore_case)


class RegexKeys(Section):
    """`scorer: {name: regex, ...}`"""

    name: Literal["regex"]
    ignore_case: bool = False

    def build(self) -> Scorer:
        return scorers_text.Regex(self.ignore_case)


class NumericKeys(Section):
    """`scorer: {name: numeric, ...}`"""

    name: Literal["numeric"]
    tolerance: Size = 0.0
    relative_tolerance: Size = 0.0
    take: Literal["last", "first", "only"] = "last"

    def build(self) -> Scorer:
        return scorers_text.Numeric(self.tolerance, self.relative_tolerance, self.take)


class ChoiceKeys(Section):
    """`scorer: {name: choice, ...}`"""

    name: Literal["choice"]
    choices: list[Filled] = Field(min_length=2)

    def build(self) -> Scorer:
        return scorers_text.Choice(tuple(self.choices))


class SimilarityKeys(Section):
    """`scorer: {name: similarity, ...}`"""

    name: Literal["similarity"]
    full_at: float = Field(1.0, gt=0, le=1)

    def build(self) -> Scorer:
        return scorers_text.Similarity(self.full_at)


class PerplexityKeys(Section):
    """`scorer: {name: perplexity}`"""

    name: Literal["perplexity"]

    def build(self) -> Scorer:
        return scorers_text.Perplexity()


class AnyOfKeys(Section):
    """`scorer: {name: any_of, scorers: [...]}`"""

    name: Literal["any_of"]
    scorers: list[ScorerKeys] = Field(min_length=2, max_length=8)

    def build(self) -> Scorer:
        return AnyOf(tuple(each.build() for each in self.scorers))


class AllOfKeys(Section):
    """`scorer: {name: all_of, scorers: [...]}`"""

    name: Literal["all_of"]
    scorers: list[ScorerKeys] = Field(min_length=2, max_length=8)

    def build(self) -> Scorer:
        return AllOf(tuple(each.build() for each in self.scorers))


ScorerKeys = Annotated[
    WrappedCallKeys
    | ToolCallKeys
    | JsonKeys
    | InstructionsKeys
    | TalkKeys
    | ExactKeys
    | ContainsKeys
    | RegexKeys
    | NumericKeys
    | ChoiceKeys
    | SimilarityKeys
    | PerplexityKeys
    | AnyOfKeys
    | AllOfKeys,
    Field(discriminator="name"),
]
SCORERS: dict[str, tuple[type[Any], type[Section], type[Any]]] = {
    "wrapped_call": (WrappedCallKeys, WrappedCallTarget, WrappedCall),
    "tool_call": (ToolCallKeys, ToolCallTarget, ToolCall),
    "json": (JsonKeys, JsonTarget, scorers_json.Json),
    "instructions": (InstructionsKeys, InstructionsTarget, scorers_rules.Instructions),
    "talk": (TalkKeys, TalkTarget, scorers_text.Talk),
    "exact": (ExactKeys, ExactTarget, scorers_text.Exact),
    "contains": (ContainsKeys, ContainsTarget, scorers_text.Contains),
    "regex": (RegexKeys, RegexTarget, scorers_text.Regex),
    "numeric": (NumericKeys, NumericTarget, scorers_text.Numeric),
    "choice": (ChoiceKeys, ChoiceTarget, scorers_text.Choice),
    "similarity": (SimilarityKeys, SimilarityTarget, scorers_text.Similarity),
    "perplexity": (PerplexityKeys, PerplexityTarget, scorers_text.Perplexity),
    "any_of": (AnyOfKeys, SeveralTarget, AnyOf),
    "all_of": (AllOfKeys, SeveralTarget, AllOf),
}


def target_fault(scorer: Any, target: Section) -> str | None:
    """Return what is wrong with a target under this scorer although its keys are right, or None."""
    if isinstance(target, ChoiceTarget) and isinstance(scorer, ChoiceKeys):
        known = target.choice in scorer.choices
        return None if known else f"{target.choice!r} is not one of {', '.join(scorer.choices)}"
    if isinstance(target, WrappedCallTarget) and isinstance(scorer, WrappedCallKeys):
        return _wrapped_call_fault(scorer, target)
    if isinstance(target, JsonTarget) and isinstance(scorer, JsonKeys):
        empty = target.value is None and scorer.form is None
        return "there is neither a value nor a schema to compare with" if empty else None
    if isinstance(target, SeveralTarget):
        return _several_fault(scorer, target)
    return None


def _wrapped_call_fault(scorer: WrappedCallKeys, target: WrappedCallTarget) -> str | None:
    for call in target.calls:
        if call.name not in scorer.tools:
            return f"target calls {call.name}, which is not one of the scorer's tools"
        unknown = [name for name in call.arguments if name not in scorer.tools[call.name]]
        if unknown:
            return f"target gives {call.name} the argument {unknown[0]}, which it does not have"
    return None


def _several_fault(scorer: Any, target: SeveralTarget) -> str | None:
    if len(target.of) != len(scorer.scorers):
        return f"{len(target.of)} targets for {len(scorer.scorers)} scorers"
    for number, (inner, given) in enumerate(zip(scorer.scorers, target.of, strict=True)):
        try:
            checked = SCORERS[inner.name][1].model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(key_path(("of", number, *first["loc"])))
            return f"target.{key}: {first['msg']}"
        fault = target_fault(inner, checked)
        if fault is not None:
            return f"target.of.{number}: {fault}"
    return None
