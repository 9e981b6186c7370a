"""wrapped_call, tool_call: target, keys, rule.

Does: compare calls with the calls wanted. Kinds of mistakes follow the Berkeley function-calling
leaderboard's ast_checker: count, name, missing and unexpected arguments, types, values.
Does not: execute anything, or raise, for any text.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from mlx_ft.evaluate.scorers.call_parsing import (
    Call,
    attempts_a_call,
    embedded_wrapper_calls,
    same_value,
    unwrapped_calls,
    wrapped_calls,
    written,
)
from mlx_ft.evaluate.scorers.keys import Constant, Identifier, ScorerKeys
from mlx_ft.evaluate.scorers.protocol import Given, Score, Scorer, right, wrong
from mlx_ft.evaluate.scorers.tool_formats import (
    FoundToolCall,
    format_names,
    found_calls,
    looks_like_a_call,
)
from mlx_ft.evaluate.suite_keys import Filled
from mlx_ft.recipe.fields import Section

Difference = tuple[str, str]


class WantedCall(Section):
    """One call of a wrapped_call target."""

    name: Identifier
    arguments: dict[Identifier, Constant]


class WrappedCallTarget(Section):
    """Target of wrapped_call."""

    calls: list[WantedCall] = Field(min_length=1)


class WrappedCallKeys(ScorerKeys):
    """`scorer: {name: wrapped_call, ...}`"""

    name: Literal["wrapped_call"]
    target = WrappedCallTarget
    wrapper: Identifier
    tools: dict[Identifier, list[Identifier]] = Field(min_length=1)

    def build(self) -> Scorer:
        return WrappedCall(self.wrapper, {k: tuple(v) for k, v in self.tools.items()})

    def target_fault(self, target: WrappedCallTarget) -> str | None:
        for call in target.calls:
            if call.name not in self.tools:
                return f"target calls {call.name}, which is not one of the scorer's tools"
            unknown = [name for name in call.arguments if name not in self.tools[call.name]]
            if unknown:
                return f"target gives {call.name} the argument {unknown[0]}, which it does not have"
        return None


@dataclass(frozen=True)
class WrappedCall(Scorer):
    """Calls to `tools` (name -> parameter names), made through `wrapper("...")`.

    Target: {"calls": [{"name", "arguments": {}}]}, in the order wanted.

    1.0: the text, stripped of outer white space, parses as Python; each statement is a call of the
    wrapper with one string as its only argument, optionally assigned to a name; the strings, taken
    together, hold exactly the calls wanted, in order, each a statement of its own, optionally
    assigned to a name, with exactly the arguments wanted (by position or by name, constants only).
    0.5, extra_text: the same calls, in the wrapper, but with prose, a code fence, `print` or other
    code around them. The answer would have to be cut out of it, and a runner that executes the
    whole text would fail or do more than was asked.
    0.5, wrong_wrapper: the same calls bare, in a code fence, as JSON or tags, in another function's
    string, or in a wrapper that does not parse.
    0.0: anything else, with thinking counted as such and right calls in an endless loop as a loop.
    """

    wrapper: str
    tools: Mapping[str, tuple[str, ...]]
    leaves_no_room = True

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        wanted = [Call(call["name"], call["arguments"]) for call in target["calls"]]
        strict = wrapped_calls(text, self.wrapper, self.tools)
        wrapped = strict or embedded_wrapper_calls(text, self.wrapper, self.tools)
        found = wrapped or unwrapped_calls(text, self.wrapper, self.tools)
        if found is None:
            if attempts_a_call(text, self.wrapper, self.tools):
                return wrong("unparsable", "looks like a call but cannot be read")
            return wrong("prose", "no call at all")
        answer = "\n".join(str(call) for call in found.calls)
        difference = _difference(found.calls, wanted)
        if difference is not None:
            return wrong(*difference, answer)
        if wrapped is None:
            return wrong("wrong_wrapper", f"right, but not through {self.wrapper}", answer, 0.5)
        if not wrapped.alone:
            return wrong("extra_text", "right, with other text or code around it", answer, 0.5)
        return right(answer)

    def ideal(self, target: Mapping[str, Any]) -> str | None:
        code = "\n".join(
            f"{call['name']}({', '.join(f'{k}={v!r}' for k, v in call['arguments'].items())})"
            for call in target["calls"]
        )
        return f"{self.wrapper}({code!r})"


def _difference(found: Sequence[Call], wanted: Sequence[Call]) -> Difference | None:
    """Return (failure, reason) of the first fault of the calls, or None."""
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


def _call_difference(got: Call, want: Call) -> Difference:
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
    found, wanted = written(got.arguments[name]), written(want.arguments[name])
    return "wrong_argument", f"{name} is {found}, not {wanted}"


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


class ToolCallKeys(ScorerKeys):
    """`scorer: {name: tool_call, ...}`"""

    name: Literal["tool_call"]
    target = ToolCallTarget
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


@dataclass(frozen=True)
class ToolCall(Scorer):
    """Calls to the tools that the prompt declares, in a model's own format.

    Target: {"calls": [{"name", "arguments": {}, "accepted": {}, "optional": []}]}: `accepted` gives
    further right values of an argument, `optional` the arguments that may be left out. No calls
    ([]) means that nothing should be called.

    `format` is `auto` (any of mlx-lm's tool parsers whose opening mark is in the text), the name of
    one of these parsers, or `json` (the text is a JSON call, or a list of them, and nothing else).
    `order` is `any` or `given`. With `loose_strings`, case, white space and the marks ,./-_*^ do
    not count in strings, as in the Berkeley leaderboard.
    1.0: exactly the calls wanted, in the format; text around a marked call is ordinary.
    0.5, wrong_wrapper: the same calls as JSON or in another model's format. 0.0: anything else.
    """

    format: str = "auto"
    order: Literal["any", "given"] = "any"
    loose_strings: bool = False
    reads = "raw"

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        marked = text if given.raw is None else given.raw
        found = found_calls(marked, self.format, given.tools)
        wanted: Sequence[Mapping[str, Any]] = target["calls"]
        if found is None:
            if looks_like_a_call(marked):
                return wrong("unparsable", "looks like a call but cannot be read")
            if not wanted:
                return right("", "no call, as wanted")
            return wrong("prose", "no call at all")
        answer = "\n".join(_shown(call) for call in found.calls)
        difference = self._difference(found.calls, wanted, _types_of(given.tools))
        if difference is not None:
            return wrong(*difference, answer)
        if not found.in_format:
            return wrong("wrong_wrapper", f"right, but not in {self.format} form", answer, 0.5)
        return right(answer)

    def ideal(self, target: Mapping[str, Any]) -> str | None:
        calls = [{"name": c["name"], "arguments": c["arguments"]} for c in target["calls"]]
        if not calls:
            return "No tool is needed for that."
        if self.format == "json":
            return json.dumps(calls, ensure_ascii=False)
        if self.format not in ("auto", "json_tools"):
            return None
        lines = (json.dumps(call, ensure_ascii=False) for call in calls)
        return "\n".join(f"<tool_call>\n{line}\n</tool_call>" for line in lines)

    def _difference(
        self,
        found: Sequence[FoundToolCall],
        wanted: Sequence[Mapping[str, Any]],
        types: Mapping[str, Mapping[str, Any]],
    ) -> Difference | None:
        """Return the first fault, once each wanted call has taken one that fits it."""
        left = list(found)
        missing = []
        taken = []
        for want in wanted:
            fits = (each for each in left if self._call_fault(each, want, types) is None)
            match = next(fits, None)
            if match is None:
                missing.append(want)
            else:
                left.remove(match)
                taken.append(match)
        if not missing and not left:
            in_order = self.order == "any" or all(a is b for a, b in zip(taken, found, strict=True))
            return None if in_order else ("wrong_order", "the right calls in another order")
        if not missing:
            return "extra_call", f"also calls {_shown(left[0])}"
        if not left:
            return "missing_call", f"does not call {missing[0]['name']}"
        pairs = ((got, want) for want in missing for got in left if got.name == want["name"])
        got, want = next(pairs, (left[0], missing[0]))
        return self._call_fault(got, want, types)

    def _call_fault(
        self, got: FoundToolCall, want: Mapping[str, Any], types: Mapping[str, Mapping[str, Any]]
    ) -> Difference | None:
        if got.name != want["name"]:
            return "wrong_tool", f"calls {got.name}, not {want['name']}"
        optional = want.get("optional") or ()
        for name in want["arguments"]:
            if name not in got.arguments and name not in optional:
                return "missing_argument", f"{got.name} without {name}"
        for name in got.arguments:
            if name not in want["arguments"]:
                return "unexpected_argument", f"{got.name} with {name}"
        for name, value in got.arguments.items():
            accepted = [want["arguments"][name], *(want.get("accepted") or {}).get(name, ())]
            if any(self._same(value, each) for each in accepted):
                continue
            shown = f"{name} is {_json(value)}"
            declared = types.get(got.name, {}).get(name)
            if not _is_of_type(value, declared, accepted[0]):
                return "wrong_type", f"{shown}, no {declared or type(accepted[0]).__name__}"
            return "wrong_argument", f"{shown}, not {_json(accepted[0])}"
        return None

    def _same(self, one: Any, other: Any) -> bool:
        if isinstance(one, bool) or isinstance(other, bool):
            return one is other
        if isinstance(one, str) and isinstance(other, str):
            return _loose(one) == _loose(other) if self.loose_strings else one == other
        if isinstance(one, list) and isinstance(other, list):
            return len(one) == len(other) and all(map(self._same, one, other))
        if isinstance(one, dict) and isinstance(other, dict):
            return one.keys() == other.keys() and all(self._same(one[k], other[k]) for k in one)
        if isinstance(one, int | float) and isinstance(other, int | float):
            return one == other
        return one is None and other is None


_IGNORED_MARKS = re.compile(r"[\s,./\-_*^]")


def _loose(text: str) -> str:
    return _IGNORED_MARKS.sub("", text).lower().replace("'", '"')


JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def _types_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return tool -> argument -> type, of all arguments whose schema declares a type."""
    found: dict[str, dict[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool)
        parameters = function.get("parameters") if isinstance(function, Mapping) else None
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if isinstance(properties, Mapping):
            found[str(function.get("name"))] = {
                name: schema.get("type")
                for name, schema in properties.items()
                if isinstance(schema, Mapping) and isinstance(schema.get("type"), str)
            }
    return found


def _is_of_type(value: Any, declared: Any, like: Any) -> bool:
    """Return whether a value has the declared JSON type, or without one that of `like`."""
    if declared in JSON_TYPES:
        if isinstance(value, bool):
            return bool(declared == "boolean")
        if declared == "integer" and isinstance(value, float):
            return math.isfinite(value) and value.is_integer()
        return isinstance(value, JSON_TYPES[declared])
    if isinstance(value, bool) or isinstance(like, bool):
        return isinstance(value, bool) and isinstance(like, bool)
    numbers = (int, float)
    if isinstance(like, numbers):
        return isinstance(value, numbers)
    return isinstance(value, type(like))


def _shown(call: FoundToolCall) -> str:
    return f"{call.name}({', '.join(f'{k}={_json(v)}' for k, v in call.arguments.items())})"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
