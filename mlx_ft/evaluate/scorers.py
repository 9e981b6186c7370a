"""Judge one answer: a value from 0 to 1, what was understood, why, and which kind of wrong it is.

Does: pure functions from (scorer, text, target) to a Score; each scorer's rule is its docstring.
Does not: generate, read files, execute code, or import MLX. Text is a model's and may be anything;
the patterns of the `regex` scorer are the suite author's and are trusted to be sane.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_ft.degenerate import degenerate_reason
from mlx_ft.evaluate.call_parsing import (
    Call,
    attempts_a_call,
    embedded_wrapper_calls,
    same_value,
    unwrapped_calls,
    wrapped_calls,
    written,
)

MAX_TEXT_CHARACTERS = 32_768
THINKING_TAGS = ("<think>", "</think>")
FAILURES = (
    "empty",
    "loop",
    "thinking_leak",
    "too_large",
    "wrong_wrapper",
    "extra_text",
    "wrong_tool",
    "wrong_argument",
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
)


@dataclass(frozen=True)
class Score:
    """A value from 0 to 1, the `answer` understood, the `reason`, and the `failure` kind.

    `failure` is one of FAILURES, or None exactly when the value is 1.
    """

    value: float
    answer: str
    reason: str
    failure: str | None

    def __post_init__(self) -> None:
        assert (self.failure is None) == (self.value == 1.0)
        assert self.failure is None or self.failure in FAILURES


@dataclass(frozen=True)
class WrappedCall:
    """Calls to `tools` (name -> parameter names), made through `wrapper("...")`.

    Target: {"calls": [{"name", "arguments": {}}]}, in the order wanted.

    1.0: the text, stripped of outer white space, parses as Python; each statement is a call of the
    wrapper with one string as its only argument, optionally assigned to a name; the strings, taken
    together, hold exactly the calls wanted, in order, each a statement of its own, optionally
    assigned to a name, with exactly the arguments wanted (by position or by name, constants only).
    0.5, extra_text: the same calls, in the wrapper, but with prose, a code fence, `print` or other
    code around them. Somebody would have to cut the answer out of it, and a runner that executes
    the whole text would fail or do more than was asked.
    0.5, wrong_wrapper: the same calls bare, in a code fence, as JSON or tags, in another function's
    string, or in a wrapper that does not parse.
    0.0: anything else, with thinking counted as such and right calls in an endless loop as a loop.
    """

    wrapper: str
    tools: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Talk:
    """Ordinary talk. Target: {"any_of": [...], "min_words": 1, "max_words": 120}, all optional.

    1.0: the text contains one of `any_of` as whole words (any text when there are none; case, kind
    of apostrophe and white space do not count), none of `forbid` in any spelling of case, has at
    least min_words and at most max_words words, and is not degenerate. 0.0 otherwise.
    """

    forbid: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exact:
    """1.0 when the text is the target's {"text"}, outer white space aside."""

    ignore_case: bool = False


@dataclass(frozen=True)
class Contains:
    """1.0 when the text has all of {"all_of"} and one of {"any_of"} (where given) in it."""

    ignore_case: bool = True


@dataclass(frozen=True)
class Regex:
    """1.0 when the target's {"pattern"} is found in the text (Python's `re`, `.` spans lines)."""

    ignore_case: bool = False


@dataclass(frozen=True)
class Choice:
    """One of `choices`, such as A, B, C, D. Target: {"choice"}.

    The answer is the choice that the text is, begins with (followed by a mark or a line's end), or
    else the only one that stands in it as a whole word. 1.0 when that is the target's.
    """

    choices: tuple[str, ...]


Scorer = WrappedCall | Talk | Exact | Contains | Regex | Choice


def score(
    scorer: Scorer, text: str, target: Mapping[str, Any], ids: Sequence[int] | None = None
) -> Score:
    """Judge `text` against `target` by the scorer's rule.

    `ids` are the text's token ids where they are known; they only help to tell a loop. Never raises
    for any text. Before the rule: nothing but space is `empty`, a thinking tag `thinking_leak`,
    over 32,768 characters `too_large`; after it, an answer that loops is a `loop`, unless it is
    exactly what was wanted.
    """
    if not text.strip():
        return Score(0.0, "", "nothing was said", "empty")
    if any(tag in text for tag in THINKING_TAGS):
        return Score(0.0, "", "thinks aloud, although thinking is off", "thinking_leak")
    if len(text) > MAX_TEXT_CHARACTERS:
        return Score(0.0, "", f"{len(text)} characters", "too_large")
    judged = _by_rule(scorer, text, target)
    if judged.value == 1.0 and isinstance(scorer, WrappedCall | Exact):
        return judged  # these rules leave no room for anything that could loop
    looping = degenerate_reason(text, ids)
    if looping is not None:
        return Score(0.0, judged.answer, looping, "loop")
    return judged


def _by_rule(scorer: Scorer, text: str, target: Mapping[str, Any]) -> Score:
    if isinstance(scorer, WrappedCall):
        return _score_wrapped_call(scorer, text, target)
    if isinstance(scorer, Talk):
        return _score_talk(scorer, text, target)
    if isinstance(scorer, Exact):
        return _score_exact(scorer, text, target)
    if isinstance(scorer, Contains):
        return _score_contains(scorer, text, target)
    if isinstance(scorer, Regex):
        return _score_regex(scorer, text, target)
    return _score_choice(scorer, text, target)


def _score_wrapped_call(scorer: WrappedCall, text: str, target: Mapping[str, Any]) -> Score:
    wanted = [Call(call["name"], call["arguments"]) for call in target["calls"]]
    strict = wrapped_calls(text, scorer.wrapper, scorer.tools)
    wrapped = strict or embedded_wrapper_calls(text, scorer.wrapper, scorer.tools)
    found = wrapped or unwrapped_calls(text, scorer.wrapper, scorer.tools)
    if found is None:
        if attempts_a_call(text, scorer.wrapper, scorer.tools):
            return Score(0.0, "", "looks like a call but cannot be read", "unparsable")
        return Score(0.0, "", "no call at all", "prose")
    answer = "\n".join(str(call) for call in found.calls)
    difference = _difference(found.calls, wanted)
    if difference is not None:
        failure, reason = difference
        return Score(0.0, answer, reason, failure)
    if wrapped is None:
        return Score(0.5, answer, f"right, but not through {scorer.wrapper}", "wrong_wrapper")
    if not wrapped.alone:
        return Score(0.5, answer, "right, with other text or code around it", "extra_text")
    return Score(1.0, answer, "right", None)


def _difference(found: Sequence[Call], wanted: Sequence[Call]) -> tuple[str, str] | None:
    """Return (failure, reason) of the first thing wrong with the calls, or None.

    Kinds follow the Berkeley function-calling leaderboard's ast_checker: count, name, missing and
    unexpected arguments, values.
    """
    if [call.identity for call in found] == [call.identity for call in wanted]:
        return None
    missing = _without(wanted, found)
    extra = _without(found, wanted)
    if not missing and not extra:
        return "wrong_order", "the right calls in another order"
    if not missing:
        return "extra_call", f"also calls {extra[0]}"
    if not extra:
        return "missing_call", f"does not call {missing[0]}"
    pairs = ((got, want) for want in missing for got in extra if got.name == want.name)
    got, want = next(pairs, (extra[0], missing[0]))
    return _call_difference(got, want)


def _without(calls: Sequence[Call], others: Sequence[Call]) -> list[Call]:
    """Return the calls that are left when each of `others` has taken one equal call away."""
    left = Counter(call.identity for call in others)
    rest = []
    for call in calls:
        if left[call.identity] > 0:
            left[call.identity] -= 1
        else:
            rest.append(call)
    return rest


def _call_difference(got: Call, want: Call) -> tuple[str, str]:
    if got.name != want.name:
        return "wrong_tool", f"calls {got.name}, not {want.name}"
    for name in want.arguments:
        if name not in got.arguments:
            return "missing_argument", f"{want.name} without {name}"
    for name in got.arguments:
        if name not in want.arguments:
            return "unexpected_argument", f"{want.name} with {name}"
    name = next(
        name for name in want.arguments if not same_value(got.arguments[name], want.arguments[name])
    )
    found, right = written(got.arguments[name]), written(want.arguments[name])
    return "wrong_argument", f"{name} is {found}, not {right}"


def plain(text: str) -> str:
    """Return text for comparing words: lower case, one kind of apostrophe, single spaces."""
    return " ".join(text.lower().replace("\u2019", "'").split())


def _has_word(words: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(plain(phrase))}(?!\w)", words) is not None


def _score_talk(scorer: Talk, text: str, target: Mapping[str, Any]) -> Score:
    words = plain(text)
    count = len(words.split())
    accepted = target.get("any_of") or []
    for phrase in scorer.forbid:
        if plain(phrase) in words:
            return Score(0.0, "", f"says {phrase!r}", "forbidden_text")
    if count < target.get("min_words", 1):
        return Score(0.0, "", f"{count} words", "too_short")
    if count > target.get("max_words", 120):
        return Score(0.0, "", f"{count} words", "too_long")
    said = next((phrase for phrase in accepted if _has_word(words, phrase)), None)
    if accepted and said is None:
        return Score(0.0, "", "none of the accepted words", "wrong_answer")
    return Score(1.0, said or "", f"says {said!r}" if said else "talks", None)


def _score_exact(scorer: Exact, text: str, target: Mapping[str, Any]) -> Score:
    answer, right = text.strip(), target["text"].strip()
    same = answer.lower() == right.lower() if scorer.ignore_case else answer == right
    if same:
        return Score(1.0, answer, "the text wanted", None)
    return Score(0.0, answer, f"not {right!r}", "wrong_answer")


def _score_contains(scorer: Contains, text: str, target: Mapping[str, Any]) -> Score:
    def found(part: str) -> bool:
        return part.lower() in text.lower() if scorer.ignore_case else part in text

    missing = [part for part in target.get("all_of", []) if not found(part)]
    any_of = target.get("any_of", [])
    said = [part for part in any_of if found(part)]
    if missing:
        return Score(0.0, "", f"{missing[0]!r} is not in it", "wrong_answer")
    if any_of and not said:
        return Score(0.0, "", "none of the accepted texts is in it", "wrong_answer")
    return Score(1.0, said[0] if said else "", "all there", None)


def _score_regex(scorer: Regex, text: str, target: Mapping[str, Any]) -> Score:
    flags = re.DOTALL | (re.IGNORECASE if scorer.ignore_case else 0)
    match = re.search(target["pattern"], text, flags)
    if match is None:
        return Score(0.0, "", "the pattern is not in it", "wrong_answer")
    return Score(1.0, match.group(), "the pattern is in it", None)


def _score_choice(scorer: Choice, text: str, target: Mapping[str, Any]) -> Score:
    answer, named = _chosen(scorer.choices, text.strip())
    if answer is None:
        failure = "ambiguous_answer" if named else "no_answer"
        return Score(0.0, ", ".join(named), "no single choice", failure)
    if answer != target["choice"]:
        return Score(0.0, answer, f"not {target['choice']}", "wrong_answer")
    return Score(1.0, answer, "the right choice", None)


def _chosen(choices: Sequence[str], text: str) -> tuple[str | None, list[str]]:
    """Return the choice made, or None, and all choices named as whole words."""
    named = [c for c in choices if re.search(rf"(?<!\w){re.escape(c)}(?!\w)", text)]
    for choice in choices:
        if re.match(rf"\(?{re.escape(choice)}\s*([).:,;]|\n|$)", text):
            return choice, named
    return (named[0] if len(named) == 1 else None), named
