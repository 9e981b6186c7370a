"""The keys that each scorer may have in a suite, and which targets belong to it: the closed list.

Does: declare them, with the checks within one value, and build the scorers (`keys.py` has
the targets' keys). Does not: read files or judge answers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from mlx_ft.evaluate.scorers.instructions import Instructions, InstructionsKeys, InstructionsTarget
from mlx_ft.evaluate.scorers.keys import SeveralTarget
from mlx_ft.evaluate.scorers.protocol import Scorer
from mlx_ft.evaluate.scorers.score import AllOf, AnyOf
from mlx_ft.evaluate.scorers.structured import Json, JsonKeys, JsonTarget
from mlx_ft.evaluate.scorers.text import (
    Choice,
    ChoiceKeys,
    ChoiceTarget,
    Contains,
    ContainsKeys,
    ContainsTarget,
    Exact,
    ExactKeys,
    ExactTarget,
    Numeric,
    NumericKeys,
    NumericTarget,
    Perplexity,
    PerplexityKeys,
    PerplexityTarget,
    Regex,
    RegexKeys,
    RegexTarget,
    Similarity,
    SimilarityKeys,
    SimilarityTarget,
    Talk,
    TalkKeys,
    TalkTarget,
)
from mlx_ft.evaluate.scorers.tool_calls import (
    ToolCall,
    ToolCallKeys,
    ToolCallTarget,
    WrappedCall,
    WrappedCallKeys,
    WrappedCallTarget,
)
from mlx_ft.recipe.fields import Section
from mlx_ft.recipe.strict_yaml import key_path


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
    "json": (JsonKeys, JsonTarget, Json),
    "instructions": (InstructionsKeys, InstructionsTarget, Instructions),
    "talk": (TalkKeys, TalkTarget, Talk),
    "exact": (ExactKeys, ExactTarget, Exact),
    "contains": (ContainsKeys, ContainsTarget, Contains),
    "regex": (RegexKeys, RegexTarget, Regex),
    "numeric": (NumericKeys, NumericTarget, Numeric),
    "choice": (ChoiceKeys, ChoiceTarget, Choice),
    "similarity": (SimilarityKeys, SimilarityTarget, Similarity),
    "perplexity": (PerplexityKeys, PerplexityTarget, Perplexity),
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
