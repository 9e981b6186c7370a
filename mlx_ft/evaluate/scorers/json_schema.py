"""The part of JSON Schema that says what a structured answer must look like.

Does: check a schema before it is used (an unknown keyword is a fault, not a wish), and name every
place where a value breaks it. Does not: follow references, or load anything.
Keywords: type, properties, required, additionalProperties, items, enum, const, minimum, maximum,
exclusiveMinimum, exclusiveMaximum, multipleOf, minLength, maxLength, pattern, minItems, maxItems,
uniqueItems, anyOf, allOf, and title, description, default, examples, which say nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlx_ft.text.timed_regex import TooSlow, pattern_fault, search

MAX_DEPTH = 20
MAX_FAULTS = 20
SAYS_NOTHING = ("title", "description", "default", "examples", "$schema", "$id", "$comment")
TYPES = ("string", "integer", "number", "boolean", "array", "object", "null")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_LISTS = ("anyOf", "allOf")


def schema_faults(schema: Any, at: str = "schema", depth: int = 0) -> Iterator[str]:
    """Yield what is wrong with a schema, each with its place in it."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        yield f"{at} is no schema" if depth <= MAX_DEPTH else f"{at} is nested too deeply"
        return
    for key, value in schema.items():
        here = f"{at}.{key}"
        if key == "type":
            given = value if isinstance(value, list) else [value]
            yield from (f"{here} is {each!r}" for each in given if each not in TYPES)
        elif key == "properties":
            if not isinstance(value, Mapping):
                yield f"{here} is no mapping of names to schemas"
                continue
            for name, inner in value.items():
                yield from schema_faults(inner, f"{here}.{name}", depth + 1)
        elif key in ("items", "additionalProperties"):
            yield from schema_faults(value, here, depth + 1)
        elif key in _LISTS:
            if not isinstance(value, list) or not value:
                yield f"{here} is no list of schemas"
                continue
            for number, inner in enumerate(value):
                yield from schema_faults(inner, f"{here}.{number}", depth + 1)
        elif not _is_right_keyword(key, value):
            known = key in KEYWORDS
            yield f"{here} is {value!r:.60}" if known else f"{here} is not a keyword known here"
        elif key == "pattern" and (fault := pattern_fault(value)) is not None:
            yield f"{here} is no regular expression ({fault})"


def _is_right_keyword(key: str, value: Any) -> bool:
    if key in _NUMBERS:
        positive = key != "multipleOf" or (_is_number(value) and value > 0)
        return _is_number(value) and positive
    if key in _COUNTS:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if key == "required":
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    if key == "enum":
        return isinstance(value, list) and bool(value)
    if key == "uniqueItems":
        return isinstance(value, bool)
    return key in ("const", *SAYS_NOTHING) or (key == "pattern" and isinstance(value, str))


KEYWORDS = (
    *("type", "properties", "required", "additionalProperties", "items", "enum", "const"),
    *(*_NUMBERS, *_COUNTS, *_LISTS, *SAYS_NOTHING),
    *("pattern", "uniqueItems"),
)


def violations(value: Any, schema: Any, at: str = "") -> list[str]:
    """Return where a JSON value breaks a schema that has no faults, at most 20 places."""
    found = []
    for each in _violations(value, schema, at or "the answer", 0):
        found.append(each)
        if len(found) == MAX_FAULTS:
            break
    return found


def _violations(value: Any, schema: Any, at: str, depth: int) -> Iterator[str]:
    if schema is True:
        return
    if schema is False:
        yield f"{at} should not be there"
        return
    if depth > MAX_DEPTH:
        yield f"{at} is nested too deeply"
        return
    wanted = schema.get("type")
    if wanted is not None and not any(
        is_of_type(value, each) for each in (wanted if isinstance(wanted, list) else [wanted])
    ):
        yield f"{at} is no {' or '.join(wanted) if isinstance(wanted, list) else wanted}"
        return
    if "enum" in schema and not any(same_json(value, each) for each in schema["enum"]):
        yield f"{at} is none of the {len(schema['enum'])} values allowed"
    if "const" in schema and not same_json(value, schema["const"]):
        yield f"{at} is not {json.dumps(schema['const'])}"
    for check in (_of_number, _of_text):
        yield from (f"{at} {fault}" for fault in check(value, schema))
    yield from _of_array(value, schema, at, depth)
    yield from _of_object(value, schema, at, depth)
    for inner in schema.get("allOf", ()):
        yield from _violations(value, inner, at, depth + 1)
    options = schema.get("anyOf")
    if options and all(next(_violations(value, o, at, depth + 1), None) for o in options):
        yield f"{at} is none of the {len(options)} forms allowed"


def _of_number(value: Any, schema: Mapping[str, Any]) -> Iterator[str]:
    if not _is_number(value):
        return
    limits: Sequence[tuple[str, Callable[[float, float], bool], str]] = (
        ("minimum", lambda a, b: a >= b, "is below"),
        ("maximum", lambda a, b: a <= b, "is above"),
        ("exclusiveMinimum", lambda a, b: a > b, "is not above"),
        ("exclusiveMaximum", lambda a, b: a < b, "is not below"),
    )
    for key, holds, words in limits:
        if key in schema and not holds(value, schema[key]):
            yield f"{words} {schema[key]}"
    step = schema.get("multipleOf")
    if step is not None and not math.isclose(value / step, round(value / step), abs_tol=1e-9):
        yield f"is no multiple of {step}"


def _of_text(value: Any, schema: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(value, str):
        return
    if len(value) < schema.get("minLength", 0):
        yield f"has {len(value)} characters"
    if len(value) > schema.get("maxLength", len(value)):
        yield f"has {len(value)} characters"
    if "pattern" in schema:
        try:
            if search(schema["pattern"], value, dot_all=False) is None:
                yield "does not match its pattern"
        except TooSlow as error:
            yield f"could not be matched: {error}"


def _of_array(value: Any, schema: Mapping[str, Any], at: str, depth: int) -> Iterator[str]:
    if not isinstance(value, list):
        return
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        yield f"{at} has {len(value)} items"
    if schema.get("uniqueItems"):
        texts = [json.dumps(each, sort_keys=True) for each in value]
        if len(set(texts)) < len(texts):
            yield f"{at} has an item twice"
    if "items" in schema:
        for number, each in enumerate(value):
            yield from _violations(each, schema["items"], f"{at}[{number}]", depth + 1)


def _of_object(value: Any, schema: Mapping[str, Any], at: str, depth: int) -> Iterator[str]:
    if not isinstance(value, dict):
        return
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{at} has no {name}"
    for name, each in value.items():
        if name in properties:
            yield from _violations(each, properties[name], f"{at}.{name}", depth + 1)
        elif "additionalProperties" in schema:
            yield from _violations(each, schema["additionalProperties"], f"{at}.{name}", depth + 1)


def is_of_type(value: Any, name: str) -> bool:
    """Return whether a JSON value has one of the TYPES; 3.0 is an integer, true is no number."""
    if isinstance(value, bool):
        return name == "boolean"
    if name in ("integer", "number"):
        return _is_number(value) and (name == "number" or float(value).is_integer())
    kinds: Mapping[str, type] = {
        "string": str,
        "array": list,
        "object": dict,
        "null": type(None),
        "boolean": bool,
    }
    return isinstance(value, kinds[name])


def same_json(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal, where 1 is 1.0 but not true."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[k], other[k]) for k in one)
    return bool(one == other)


def _is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 10**300
    return isinstance(value, float) and math.isfinite(value)
