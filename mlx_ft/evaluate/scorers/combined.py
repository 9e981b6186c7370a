"""any_of, all_of: scorers made of other scorers - target, keys, rule.

Does not: know the list of scorers. The keys name it only as `ListedKeys`, and `registry.py` says
which keys these are; until it is imported, the classes AnyOfKeys and AllOfKeys cannot be used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from mlx_ft.evaluate.scorers.keys import ScorerKeys
from mlx_ft.evaluate.scorers.protocol import Given, Score, Scorer
from mlx_ft.recipe.fields import Section
from mlx_ft.recipe.strict_yaml import key_path

if TYPE_CHECKING:
    ListedKeys = ScorerKeys

_SURE = Given(reference_loss=0.0)


class SeveralTarget(Section):
    """Target of any_of and all_of: one target for each of their scorers."""

    of: list[dict[str, Any]]


class AnyOfKeys(ScorerKeys):
    """`scorer: {name: any_of, scorers: [...]}`"""

    name: Literal["any_of"]
    target = SeveralTarget
    scorers: list[ListedKeys] = Field(min_length=2, max_length=8)

    def build(self) -> Scorer:
        return AnyOf(tuple(each.build() for each in self.scorers))

    def target_fault(self, target: SeveralTarget) -> str | None:
        return _several_fault(self.scorers, target.of)


@dataclass(frozen=True)
class AnyOf(Scorer):
    """The best of several scorers. Target: {"of": [...]}, one target for each, in their order."""

    scorers: tuple[Scorer, ...]
    reads = "raw"

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        return max(_judged(self.scorers, text, target, given), key=lambda each: each.value)

    def ideal(self, target: Mapping[str, Any]) -> str | None:
        spelled = (s.ideal(t) for s, t in zip(self.scorers, target["of"], strict=True))
        return next((text for text in spelled if text is not None), None)

    def reference(self, target: Mapping[str, Any]) -> str | None:
        return _first_reference(self.scorers, target)


class AllOfKeys(ScorerKeys):
    """`scorer: {name: all_of, scorers: [...]}`"""

    name: Literal["all_of"]
    target = SeveralTarget
    scorers: list[ListedKeys] = Field(min_length=2, max_length=8)

    def build(self) -> Scorer:
        return AllOf(tuple(each.build() for each in self.scorers))

    def target_fault(self, target: SeveralTarget) -> str | None:
        return _several_fault(self.scorers, target.of)


@dataclass(frozen=True)
class AllOf(Scorer):
    """The worst of several scorers. Target: {"of": [...]}, one target for each, in their order."""

    scorers: tuple[Scorer, ...]
    reads = "raw"

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        return min(_judged(self.scorers, text, target, given), key=lambda each: each.value)

    def ideal(self, target: Mapping[str, Any]) -> str | None:
        pairs = list(zip(self.scorers, target["of"], strict=True))
        spelled = [text for s, t in pairs if (text := s.ideal(t)) is not None]
        whole = (
            text for text in spelled if all(s.judge(text, t, _SURE).value == 1 for s, t in pairs)
        )
        return next(whole, None)

    def reference(self, target: Mapping[str, Any]) -> str | None:
        return _first_reference(self.scorers, target)


def _judged(
    scorers: Sequence[Scorer], text: str, target: Mapping[str, Any], given: Given
) -> list[Score]:
    return [s.judge(text, t, given) for s, t in zip(scorers, target["of"], strict=True)]


def _first_reference(scorers: Sequence[Scorer], target: Mapping[str, Any]) -> str | None:
    found = (s.reference(t) for s, t in zip(scorers, target["of"], strict=True))
    return next((text for text in found if text is not None), None)


def _several_fault(scorers: Sequence[ScorerKeys], targets: Sequence[Any]) -> str | None:
    if len(targets) != len(scorers):
        return f"{len(targets)} targets for {len(scorers)} scorers"
    for number, (keys, given) in enumerate(zip(scorers, targets, strict=True)):
        try:
            checked = keys.target.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(key_path(("of", number, *first["loc"])))
            return f"target.{key}: {first['msg']}"
        fault = keys.target_fault(checked)
        if fault is not None:
            return f"target.of.{number}: {fault}"
    return None
