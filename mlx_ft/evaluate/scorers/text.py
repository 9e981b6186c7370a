"""talk, exact, contains, regex, numeric, choice, similarity, perplexity: target, keys, rule.

Does: pure functions from a text and a target to a Score. Does not: raise, for any text.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from mlx_ft.evaluate.scorers.keys import Number, ScorerKeys, Size
from mlx_ft.evaluate.scorers.protocol import Given, Score, Scorer, right, wrong
from mlx_ft.evaluate.suite_keys import Filled
from mlx_ft.recipe.fields import Section
from mlx_ft.text.timed_regex import TooSlow, pattern_fault, search


def plain(text: str) -> str:
    """Return a text for comparing words: lower case, one kind of apostrophe, single spaces."""
    return " ".join(text.lower().replace("\u2019", "'").split())


def has_word(words: str, phrase: str) -> bool:
    """Return whether a phrase stands, as whole words, in a text that `plain` has returned."""
    return re.search(rf"(?<!\w){re.escape(plain(phrase))}(?!\w)", words) is not None


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


class TalkKeys(ScorerKeys):
    """`scorer: {name: talk, ...}`"""

    name: Literal["talk"]
    target = TalkTarget
    forbid: list[Filled] = Field(default_factory=list)

    def build(self) -> Scorer:
        return Talk(tuple(self.forbid))


@dataclass(frozen=True)
class Talk(Scorer):
    """Ordinary talk. Target: {"any_of": [...], "min_words": 1, "max_words": 120}, all optional.

    1.0: the text contains one of `any_of` as whole words (any text when there are none; case, kind
    of apostrophe and white space do not count), none of `forbid` in any spelling of case, has at
    least min_words and at most max_words words, and is not degenerate. 0.0 otherwise.
    """

    forbid: tuple[str, ...] = ()

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        words = plain(text)
        count = len(words.split())
        accepted = target.get("any_of") or []
        for phrase in self.forbid:
            if plain(phrase) in words:
                return wrong("forbidden_text", f"says {phrase!r}")
        if count < target.get("min_words", 1):
            return wrong("too_short", f"{count} words")
        if count > target.get("max_words", 120):
            return wrong("too_long", f"{count} words")
        said = next((phrase for phrase in accepted if has_word(words, phrase)), None)
        if accepted and said is None:
            return wrong("wrong_answer", "none of the accepted words")
        return right(said or "", f"says {said!r}" if said else "talks")

    def ideal(self, target: Mapping[str, Any]) -> str | None:
        word = next(iter(target.get("any_of") or []), "certainly")
        missing = target.get("min_words", 1) - len(word.split())
        return " ".join([*(f"w{number}" for number in range(missing)), word])


class ExactTarget(Section):
    """Target of exact."""

    text: Filled


class ExactKeys(ScorerKeys):
    """`scorer: {name: exact, ...}`"""

    name: Literal["exact"]
    target = ExactTarget
    ignore_case: bool = False

    def build(self) -> Scorer:
        return Exact(self.ignore_case)


@dataclass(frozen=True)
class Exact(Scorer):
    """1.0 when the text is the target's {"text"}, outer white space aside."""

    ignore_case: bool = False
    leaves_no_room = True

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        answer, wanted = text.strip(), target["text"].strip()
        same = answer.lower() == wanted.lower() if self.ignore_case else answer == wanted
        if same:
            return right(answer, "the text wanted")
        return wrong("wrong_answer", f"not {wanted!r}", answer)

    def ideal(self, target: Mapping[str, Any]) -> str | None:
        return str(target["text"])


class ContainsTarget(Section):
    """Target of contains."""

    any_of: list[Filled] = Field(default_factory=list)
    all_of: list[Filled] = Field(default_factory=list)

    @model_validator(mode="after")
    def _something(self) -> ContainsTarget:
        if not self.any_of and not self.all_of:
            raise ValueError("any_of and all_of are both empty")
        return self


class ContainsKeys(ScorerKeys):
    """`scorer: {name: contains, ...}`"""

    name: Literal["contains"]
    target = ContainsTarget
    ignore_case: bool = True

    def build(self) -> Scorer:
        return Contains(self.ignore_case)


@dataclass(frozen=True)
class Contains(Scorer):
    """1.0 when the text has all of {"all_of"} and one of {"any_of"} (where given) in it."""

    ignore_case: bool = True

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        folded = text.lower() if self.ignore_case else text

        def found(part: str) -> bool:
            return (part.lower() if self.ignore_case else part) in folded

        missing = [part for part in target.get("all_of", []) if not found(part)]
        any_of = target.get("any_of", [])
        said = [part for part in any_of if found(part)]
        if missing:
            return wrong("wrong_answer", f"{missing[0]!r} is not in it")
        if any_of and not said:
            return wrong("wrong_answer", "none of the accepted texts is in it")
        return right(said[0] if said else "", "all there")

    def ideal(self, target: Mapping[str, Any]) -> str | None:
        return "\n".join([*target.get("all_of", []), *target.get("any_of", [])[:1]])


class RegexTarget(Section):
    """Target of regex."""

    pattern: Filled

    @model_validator(mode="after")
    def _compiles(self) -> RegexTarget:
        fault = pattern_fault(self.pattern)
        if fault is not None:
            raise ValueError(f"the pattern is no regular expression ({fault})")
        return self


class RegexKeys(ScorerKeys):
    """`scorer: {name: regex, ...}`"""

    name: Literal["regex"]
    target = RegexTarget
    ignore_case: bool = False

    def build(self) -> Scorer:
        return Regex(self.ignore_case)


@dataclass(frozen=True)
class Regex(Scorer):
    """1.0 when the target's {"pattern"} is found in the text (Python's syntax, `.` spans lines).

    A search that takes over a second is given up: 0.0, too_slow.
    """

    ignore_case: bool = False

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        try:
            match = search(target["pattern"], text, ignore_case=self.ignore_case)
        except TooSlow as error:
            return wrong("too_slow", str(error))
        if match is None:
            return wrong("wrong_answer", "the pattern is not in it")
        return right(match.group(), "the pattern is in it")


class NumericTarget(Section):
    """Target of numeric."""

    number: Number


class NumericKeys(ScorerKeys):
    """`scorer: {name: numeric, ...}`"""

    name: Literal["numeric"]
    target = NumericTarget
    tolerance: Size = 0.0
    relative_tolerance: Size = 0.0
    take: Literal["last", "first", "only"] = "last"

    def build(self) -> Scorer:
        return Numeric(self.tolerance, self.relative_tolerance, self.take)


@dataclass(frozen=True)
class Numeric(Scorer):
    """A number. Target: {"number"}. 1.0 when the answer's number is within `tolerance` of it, or
    within `relative_tolerance` times its size.

    The answer's number is the `last` in the text, the `first`, or the `only` one: 1,234.5, -3 and
    2e-4 are numbers, and so is the 20 of "20 %".
    """

    tolerance: float = 0.0
    relative_tolerance: float = 0.0
    take: Literal["last", "first", "only"] = "last"

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        numbers = numbers_in(text)
        if not numbers:
            return wrong("no_answer", "no number in it")
        if self.take == "only" and len(set(numbers)) > 1:
            return wrong("ambiguous_answer", f"{len(numbers)} numbers in it", f"{numbers[0]:g}")
        number, wanted = numbers[-1 if self.take == "last" else 0], float(target["number"])
        allowed = max(self.tolerance, self.relative_tolerance * abs(wanted), 1e-12 * abs(wanted))
        if abs(number - wanted) <= allowed:
            return right(f"{number:.15g}", "the number wanted")
        return wrong("wrong_answer", f"{number:.15g}, not {wanted:.15g}", f"{number:.15g}")

    def ideal(self, target: Mapping[str, Any]) -> str | None:
        return repr(target["number"])


# Before a number no letter, digit or point; thousands in groups of three after a comma.
_NUMBER = re.compile(
    r"(?<![\w.])[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d{1,3})?"
)


def numbers_in(text: str) -> list[float]:
    """Return the finite numbers in a text, in their order."""
    found = (match.group() for match in _NUMBER.finditer(text))
    plainly = (number.replace(",", "").replace("\u2212", "-") for number in found)
    return [value for value in map(float, plainly) if math.isfinite(value)]


class ChoiceTarget(Section):
    """Target of choice."""

    choice: Filled


class ChoiceKeys(ScorerKeys):
    """`scorer: {name: choice, ...}`"""

    name: Literal["choice"]
    target = ChoiceTarget
    choices: list[Filled] = Field(min_length=2)

    def build(self) -> Scorer:
        return Choice(tuple(self.choices))

    def target_fault(self, target: ChoiceTarget) -> str | None:
        known = target.choice in self.choices
        return None if known else f"{target.choice!r} is not one of {', '.join(self.choices)}"


@dataclass(frozen=True)
class Choice(Scorer):
    """One of `choices`, such as A, B, C, D. Target: {"choice"}.

    The answer is the choice that the text is, begins with (followed by a mark or a line's end), or
    else the only one that stands in it as a whole word. 1.0 when that is the target's.
    """

    choices: tuple[str, ...]

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        answer, named = _chosen(self.choices, text.strip())
        if answer is None:
            failure = "ambiguous_answer" if named else "no_answer"
            return wrong(failure, "no single choice", ", ".join(named))
        if answer != target["choice"]:
            return wrong("wrong_answer", f"not {target['choice']}", answer)
        return right(answer, "the right choice")

    def ideal(self, target: Mapping[str, Any]) -> str | None:
        return str(target["choice"])


def _chosen(choices: Sequence[str], text: str) -> tuple[str | None, list[str]]:
    """Return the choice made, or None, and all choices named as whole words."""
    named = [c for c in choices if re.search(rf"(?<!\w){re.escape(c)}(?!\w)", text)]
    for choice in choices:
        if re.match(rf"\(?{re.escape(choice)}\s*([).:,;]|\n|$)", text):
            return choice, named
    return (named[0] if len(named) == 1 else None), named


class SimilarityTarget(Section):
    """Target of similarity."""

    references: list[Filled] = Field(min_length=1)


class SimilarityKeys(ScorerKeys):
    """`scorer: {name: similarity, ...}`"""

    name: Literal["similarity"]
    target = SimilarityTarget
    full_at: float = Field(1.0, gt=0, le=1)

    def build(self) -> Scorer:
        return Similarity(self.full_at)


@dataclass(frozen=True)
class Similarity(Scorer):
    """Likeness to a text. Target: {"references": [...]}, the best of which counts.

    chrF, the F-score of shared runs of 1 to 6 characters without white space, recall counting twice
    (Popovic 2015), of at most 8,192 characters, divided by `full_at`: 1.0 from there on.
    """

    full_at: float = 1.0

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        best = max(chrf(text, reference) for reference in target["references"])
        value = min(1.0, best / self.full_at)
        reason = f"chrF {best:.2f}, full score from {self.full_at:.2f}"
        return right("", reason) if value == 1.0 else wrong("dissimilar", reason, "", value)

    def ideal(self, target: Mapping[str, Any]) -> str | None:
        return str(target["references"][0])


MAX_CHRF_CHARACTERS = 8_192


def chrf(text: str, reference: str, longest: int = 6, beta: float = 2.0) -> float:
    """Return the chrF score, 0 to 1, of two texts; only lengths of runs that both have count."""
    ours, theirs = ("".join(each.split())[:MAX_CHRF_CHARACTERS] for each in (text, reference))
    precisions, recalls = [], []
    for size in range(1, longest + 1):
        one, two = (
            Counter(each[start : start + size] for start in range(len(each) - size + 1))
            for each in (ours, theirs)
        )
        if not one or not two:
            continue
        shared = (one & two).total()
        precisions.append(shared / one.total())
        recalls.append(shared / two.total())
    if not precisions or not sum(precisions):
        return 0.0
    precision, recall = (math.fsum(each) / len(each) for each in (precisions, recalls))
    # Equal texts must give 1 exactly, which the quotient below need not.
    if precision == recall == 1.0:
        return 1.0
    return min(1.0, (1 + beta**2) * precision * recall / (beta**2 * precision + recall))


class PerplexityTarget(Section):
    """Target of perplexity."""

    reference: Filled
    max_perplexity: float = Field(ge=1, allow_inf_nan=False)


class PerplexityKeys(ScorerKeys):
    """`scorer: {name: perplexity}`"""

    name: Literal["perplexity"]
    target = PerplexityTarget

    def build(self) -> Scorer:
        return Perplexity()


@dataclass(frozen=True)
class Perplexity(Scorer):
    """How well the model expects a right answer, whatever it says itself.

    Target: {"reference", "max_perplexity"}. 1.0 when the perplexity of the reference after the
    prompt, its stop token included, is at most max_perplexity; beyond it max_perplexity over the
    perplexity.
    """

    leaves_no_room = True
    reads = "nothing"

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        assert given.reference_loss is not None, (
            "the loss of the reference has to be measured first"
        )
        loss = given.reference_loss
        perplexity = math.exp(min(loss, 700.0)) if not math.isnan(loss) else math.inf
        limit = float(target["max_perplexity"])
        reason = f"perplexity {perplexity:.3g}, at most {limit:.3g} wanted"
        if perplexity <= limit:
            return right("", reason)
        return wrong("unlikely", reason, "", min(limit / perplexity, math.nextafter(1, 0)))

    def ideal(self, target: Mapping[str, Any]) -> str | None:
        return str(target["reference"])

    def reference(self, target: Mapping[str, Any]) -> str | None:
        return str(target["reference"])
