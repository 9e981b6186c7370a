"""json: target, keys, rule.

Does: say whether an answer is JSON, keeps its schema, and has the right fields.
Does not: raise, for any text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from mlx_ft.evaluate.scorers.keys import ScorerKeys, Size
from mlx_ft.evaluate.scorers.protocol import Given, Score, Scorer, right, wrong
from mlx_ft.evaluate.suite_keys import Filled
from mlx_ft.recipe.fields import Section
from mlx_ft.text.python_code import open_brackets


class JsonTarget(Section):
    """Target of json."""

    value: dict[str, Any] | list[Any] | None = None


class JsonKeys(ScorerKeys):
    """`scorer: {name: json, ...}`"""

    name: Literal["json"]
    target = JsonTarget
    form: dict[str, Any] | None = Field(None, alias="schema")
    ignore: list[Filled] = Field(default_factory=list)
    tolerance: Size = 0.0
    ignore_case: bool = False

    @model_validator(mode="after")
    def _known_keywords(self) -> JsonKeys:
        if self.form is None:
            return self
        # Deferred: it loads jsonschema, which a suite without a schema has no use for.
        from mlx_ft.evaluate.scorers.json_schema import schema_faults

        faults = list(schema_faults(self.form))
        if faults:
            raise ValueError("; ".join(faults[:5]))
        return self

    def build(self) -> Scorer:
        return Json(self.form, tuple(self.ignore), self.tolerance, self.ignore_case)

    def target_fault(self, target: JsonTarget) -> str | None:
        empty = target.value is None and self.form is None
        return "there is neither a value nor a schema to compare with" if empty else None


@dataclass(frozen=True)
class Json(Scorer):
    """A JSON answer. Target: {"value": {...}}, or {} where only the form counts.

    The score is the share of fields that are right. A field is every value in the target that is
    no object (`a.b` for nested ones, a list is one field), and every field of the answer that the
    target does not have. Those in `ignore` do not count; a number may be off by `tolerance`; with
    `ignore_case`, case and outer white space of strings do not count. The score is halved when the
    JSON stands in other text or a fence (extra_text), and halved when it breaks `schema`. 0.0 when
    there is no JSON object or array.
    """

    schema: Mapping[str, Any] | None = None
    ignore: tuple[str, ...] = ()
    tolerance: float = 0.0
    ignore_case: bool = False

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        value, alone = _read(text)
        if value is None:
            return wrong("not_json", "no JSON object or array in it")
        answer = json.dumps(value, ensure_ascii=False)
        broken = self._violations(value)
        share, difference = 1.0, None
        if target.get("value") is not None:
            share, difference = self._share(value, target["value"])
        points = share * (1.0 if alone else 0.5) * (0.5 if broken else 1.0)
        if broken:
            more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            return wrong("schema", f"{broken[0]}{more}", answer, points)
        if difference is not None:
            return wrong(*difference, answer, points)
        if not alone:
            return wrong("extra_text", "right, with other text around it", answer, points)
        return right(answer)

    def ideal(self, target: Mapping[str, Any]) -> str | None:
        value = target.get("value")
        return None if value is None else json.dumps(value, ensure_ascii=False)

    def _violations(self, value: Any) -> list[str]:
        if self.schema is None:
            return []
        from mlx_ft.evaluate.scorers.json_schema import violations

        return violations(value, self.schema)

    def _share(self, found: Any, wanted: Any) -> tuple[float, tuple[str, str] | None]:
        """Return the share of fields that are right, and (failure, reason) of the first wrong."""
        ours, theirs = (dict(self._fields(each)) for each in (found, wanted))
        names = list(dict.fromkeys([*theirs, *ours]))
        wrongs = []
        for name in names:
            if name not in ours:
                wrongs.append(("missing_field", f"{name} is missing"))
            elif name not in theirs:
                wrongs.append(("unexpected_field", f"{name} is not wanted"))
            elif not self._same(ours[name], theirs[name]):
                shown = (
                    json.dumps(each, ensure_ascii=False) for each in (ours[name], theirs[name])
                )
                wrongs.append(("wrong_field", "{}: {:.80}, not {:.80}".format(name, *shown)))
        share = 1 - len(wrongs) / max(1, len(names))
        return share, wrongs[0] if wrongs else None

    def _fields(self, value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
        if at and at in self.ignore:
            return
        if isinstance(value, dict) and (value or not at):
            for name, inner in value.items():
                yield from self._fields(inner, f"{at}.{name}" if at else str(name))
        else:
            yield at or "the answer", value

    def _same(self, one: Any, other: Any) -> bool:
        if isinstance(one, str) and isinstance(other, str) and self.ignore_case:
            return one.strip().lower() == other.strip().lower()
        if isinstance(one, list) and isinstance(other, list):
            return len(one) == len(other) and all(map(self._same, one, other))
        both = (one, other)
        if all(isinstance(each, int | float) and not isinstance(each, bool) for each in both):
            return bool(one == other or abs(one - other) <= self.tolerance)
        return same_json(one, other)


MAX_OPEN_BRACKETS = 64
MAX_STARTS = 48
_FENCE = re.compile(r"\A\s*```\w*[ \t]*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)
_START = re.compile(r"[\[{]")


def same_json(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal, where 1 is 1.0 but not true."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[k], other[k]) for k in one)
    return bool(one == other)


def _read(text: str) -> tuple[Any, bool]:
    """Return the JSON object or array of a text, or None, and whether it is the whole text."""
    if open_brackets(text) > MAX_OPEN_BRACKETS:
        return None, False
    value = _value(text)
    if value is not None:
        return value, True
    fence = _FENCE.match(text)
    if fence is not None and (value := _value(fence[1])) is not None:
        return value, False
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    for start, _ in zip(_START.finditer(text), range(MAX_STARTS), strict=False):
        try:
            return decoder.raw_decode(text, start.start())[0], False
        except (ValueError, RecursionError):
            continue
    return None, False


def _value(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")
