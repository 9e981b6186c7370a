"""JSON Schema checks (draft 2020-12), by the jsonschema package.

Does: refuse a schema that would not be kept in full (an unknown keyword is a fault, not a wish),
and name every place where a value breaks a schema. Does not: load anything. A reference leads to
another place of the same schema, so nothing is fetched, from a disk or a network.

The value is a model's and may be anything. Its check ends, because:
- a pattern is searched with a limit on its time (`mlx_ft/text/timed_regex.py`);
- a schema whose references go round in a circle, without entering the value, is refused;
- a value nested deeper than MAX_DEPTH_OF_VALUE is not checked, so that references that follow it
  down stay within Python's stack;
- a reference is followed once for each part of the value, however many ways lead there, and
  at most MAX_REFERENCES are followed for one value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import islice
from typing import Any
from urllib.parse import unquote

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend
from referencing import Registry

from mlx_ft.evaluate.scorers.json_formats import FORMATS, has_format
from mlx_ft.text.timed_regex import TooSlow, pattern_fault, search

MAX_DEPTH_OF_SCHEMA = 20
MAX_DEPTH_OF_VALUE = 64
MAX_VIOLATIONS = 20
MAX_REFERENCES = 50_000
# A search that was given up counts as so many references: the third ends the check.
SLOW_SEARCH = MAX_REFERENCES // 2

# Keywords that hold schemas: one, a list, or a mapping of names to them.
_ONE_SCHEMA = ("items", "additionalProperties", "propertyNames", "contains")
_ONE_SCHEMA_IN_PLACE = ("not", "if", "then", "else")
_LIST_IN_PLACE = ("anyOf", "allOf", "oneOf")
_LIST = ("prefixItems", *_LIST_IN_PLACE)
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# Schemas under these are about the same value as the schema around them.
_IN_PLACE = (*_ONE_SCHEMA_IN_PLACE, *_LIST_IN_PLACE, "dependentSchemas")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_AT_THE_TOP = ("$id", "$schema")
_SAYS_NOTHING = (
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    "$comment",
    "discriminator",  # OpenAPI's, which pydantic writes beside a oneOf
)
KEYWORDS = (
    *(*_ONE_SCHEMA, *_ONE_SCHEMA_IN_PLACE, *_LIST, *_NAMED, *_NUMBERS),
    *(
        "type",
        "enum",
        "const",
        "pattern",
        "required",
        "dependentRequired",
        "uniqueItems",
        "$ref",
        "format",
    ),
    *("minLength", "maxLength", "minItems", "maxItems", "minContains", "maxContains"),
    *("minProperties", "maxProperties", *_AT_THE_TOP, *_SAYS_NOTHING),
)
# A place in a schema: the keys and numbers that lead to it.
Place = tuple[str, ...]
_TOO_DEEP = object()


def schema_faults(schema: Any) -> Iterator[str]:
    """Yield the faults of a schema, each with its place in it."""
    places = dict(_schemas_in(schema, (), MAX_DEPTH_OF_SCHEMA))
    if _TOO_DEEP in places.values():
        place = next(place for place, each in places.items() if each is _TOO_DEEP)
        yield f"{_dotted(place)} is nested too deeply"
        return
    faults: dict[Place, str] = {}
    for place, each in places.items():
        for key, fault in _own_faults(each, at_the_top=not place):
            faults.setdefault((*place, *key), fault)
    for error in Draft202012Validator(Draft202012Validator.META_SCHEMA).iter_errors(schema):
        place = tuple(map(str, error.absolute_path))
        faults.setdefault(place, f"is {error.instance!r:.60}")
    if not faults:
        faults = dict(_reference_faults(places))
    yield from (f"{_dotted(place)} {fault}" for place, fault in faults.items())


def _dotted(place: Place) -> str:
    return ".".join(("schema", *place))


def _schemas_in(schema: Any, place: Place, levels: int) -> Iterator[tuple[Place, Any]]:
    """Yield a schema and those within it; below `levels`, _TOO_DEEP in their place."""
    yield place, schema if levels >= 0 else _TOO_DEEP
    if isinstance(schema, Mapping) and levels >= 0:
        for key, inner in _within(schema):
            yield from _schemas_in(inner, (*place, *key), levels - 1)


def _within(schema: Mapping[str, Any]) -> Iterator[tuple[Place, Any]]:
    """Yield the schemas directly within one, each with the keys that lead to it."""
    for key, value in schema.items():
        if key in (*_ONE_SCHEMA, *_ONE_SCHEMA_IN_PLACE):
            yield (key,), value
        elif key in _LIST and isinstance(value, list):
            yield from (((key, str(number)), inner) for number, inner in enumerate(value))
        elif key in _NAMED and isinstance(value, Mapping):
            yield from (((key, str(name)), inner) for name, inner in value.items())


def _own_faults(schema: Any, *, at_the_top: bool) -> Iterator[tuple[Place, str]]:
    """Yield the parts of a schema that the draft allows, and that would not be kept here."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        yield (), "is no schema"
        return
    for key, value in schema.items():
        if key not in KEYWORDS:
            yield (key,), "is not a keyword known here"
        elif key in _AT_THE_TOP and not at_the_top:
            yield (key,), "is known only at the top of a schema"
        elif (key in _NUMBERS and not _is_number(value)) or (key == "enum" and value == []):
            yield (key,), f"is {value!r:.60}"
        elif key == "format" and str(value) not in FORMATS:
            yield (key,), f"is none of {', '.join(FORMATS)}"
        patterns = {"pattern": [value], "patternProperties": value}.get(key, ())
        for pattern in patterns if isinstance(patterns, list | Mapping) else ():
            if isinstance(pattern, str) and (fault := pattern_fault(pattern)) is not None:
                where = (key,) if key == "pattern" else (key, pattern)
                yield where, f"is no regular expression ({fault})"


def _reference_faults(places: Mapping[Place, Any]) -> Iterator[tuple[Place, str]]:
    """Yield references that lead out of the schema, to no schema in it, or round in a circle."""
    same_value: dict[Place, list[Place]] = {}
    for place, schema in places.items():
        if not isinstance(schema, Mapping):
            continue
        inner = [(*place, *key) for key, _ in _within(schema) if key[0] in _IN_PLACE]
        if "$ref" in schema:
            reference = schema["$ref"]
            target = _target(reference)
            if target is None:
                yield (*place, "$ref"), f"is {reference!r:.60}, which is not in this schema"
            elif target not in places:
                yield (*place, "$ref"), f"is {reference!r:.60}, where there is no schema"
            else:
                inner.append(target)
        same_value[place] = inner
    try:
        TopologicalSorter(same_value).prepare()
    except CycleError as error:
        yield error.args[1][0], "refers to itself without going into the value"


def _target(reference: str) -> Place | None:
    """Return the place that a reference such as `#/$defs/Item` names; None: in another document."""
    if not reference.startswith("#/"):
        return () if reference == "#" else None
    parts = unquote(reference[2:]).split("/")
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in parts)


class _TooMuchWork(Exception):
    """The check of a value was given up."""


@dataclass
class _Work:
    """State of the check of one value.

    left: how many more references may be followed
    followed: (reference, id of a part of the value) -> its violations, at most MAX_VIOLATIONS
    """

    left: int = MAX_REFERENCES
    followed: dict[tuple[str, int], list[ValidationError]] = field(default_factory=dict)

    def spend(self, references: int) -> None:
        """Count references; raises _TooMuchWork beyond the last."""
        self.left -= references
        if self.left < 0:
            raise _TooMuchWork


# Of the value that is being checked: jsonschema hands the functions below nothing of ours.
_work: ContextVar[_Work] = ContextVar("_work")


def violations(value: Any, schema: Any) -> list[str]:
    """Return where a JSON value breaks a schema that has no faults, at most 20 places."""
    if _is_deeper_than(MAX_DEPTH_OF_VALUE, value):
        return ["the answer is nested too deeply"]
    if isinstance(schema, Mapping):
        # With these keys, jsonschema would use its own validator of that draft in place of ours.
        schema = {key: each for key, each in schema.items() if key not in _AT_THE_TOP}
    found: list[str] = []
    _work.set(_Work())
    try:
        errors = _Validator(schema, registry=Registry()).iter_errors(value)
        for error in islice(errors, MAX_VIOLATIONS):
            found.append(f"{_place_in_answer(error)} {_words(error)}")
    except _TooMuchWork:
        found.append("the answer takes too long to check")
    except RecursionError:
        # Only where a schema has long chains of references at every level of a deep value.
        found.append("the answer is nested too deeply")
    return found


def _is_deeper_than(most: int, value: Any) -> bool:
    """Return whether lists and objects of a value are nested more than `most` levels deep."""
    level = [value]  # all parts that are so many levels deep
    for _ in range(most):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


def _place_in_answer(error: ValidationError) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
    return "the answer" + "".join(parts)


# Words for keywords with one limit; those that are not here have a message of their own.
_WORDS: Mapping[str, str] = {
    "minimum": "is below {limit}",
    "maximum": "is above {limit}",
    "exclusiveMinimum": "is not above {limit}",
    "exclusiveMaximum": "is not below {limit}",
    "minLength": "has {size} characters",
    "maxLength": "has {size} characters",
    "minItems": "has {size} items",
    "maxItems": "has {size} items",
    "items": "has {size} items",
    "minProperties": "has {size} fields",
    "maxProperties": "has {size} fields",
    "minContains": "has too few items of the form wanted",
    "maxContains": "has too many items of the form wanted",
    "contains": "has no item of the form wanted",
    "not": "is of a form that is not allowed",
    "dependentRequired": "has a field without another that belongs to it",
    "enum": "is none of the {count} values allowed",
    "anyOf": "is none of the {count} forms allowed",
}


def _words(error: ValidationError) -> str:
    """Return the fault of a value, in the words of this package."""
    keyword: Any = error.validator
    limit: Any = error.validator_value
    value: Any = error.instance
    if keyword is None:  # the schema `false`
        return "should not be there"
    if keyword == "type":
        return f"is no {' or '.join(limit) if isinstance(limit, list) else limit}"
    if keyword == "const":
        return f"is not {json.dumps(limit)}"
    if keyword == "oneOf":
        several = "none" if error.context else "more than one"
        return f"is {several} of the {len(limit)} forms allowed"
    count = len(limit) if isinstance(limit, list) else 0
    size = len(value) if isinstance(value, str | list | dict) else 0
    words = _WORDS.get(str(keyword), "{message}")
    return words.format(limit=limit, count=count, size=size, message=error.message)


def _found(pattern: str, text: str) -> bool:
    """Return whether a pattern is found; raises TooSlow."""
    try:
        return search(pattern, text, dot_all=False) is not None
    except TooSlow:
        _work.get().spend(SLOW_SEARCH)
        raise


def _reference(
    validator: Any, reference: str, value: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    work = _work.get()
    found = work.followed.get((reference, id(value)))
    if found is None:
        work.spend(1)
        errors = Draft202012Validator.VALIDATORS["$ref"](validator, reference, value, schema)
        found = list(islice(errors, MAX_VIOLATIONS))
        work.followed[reference, id(value)] = found
    # Copies: each gets the path of one way that leads here.
    yield from (ValidationError.create_from(error) for error in found)


def _pattern(
    validator: Any, pattern: str, value: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    if not isinstance(value, str):
        return
    try:
        if not _found(pattern, value):
            yield ValidationError("does not match its pattern")
    except TooSlow as error:
        yield ValidationError(f"could not be matched: {error}")


def _pattern_properties(
    validator: Any, patterns: Mapping[str, Any], value: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    for name, inner in value.items() if isinstance(value, dict) else ():
        for pattern, wanted in patterns.items():
            try:
                matches = _found(pattern, name)
            except TooSlow as error:
                yield ValidationError(f"has a name that could not be matched: {error}")
                continue
            if matches:
                yield from _field(validator, name, inner, wanted)


def _additional_properties(
    validator: Any, wanted: Any, value: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for name, inner in value.items() if isinstance(value, dict) else ():
        try:
            known = name in named or any(_found(pattern, name) for pattern in patterns)
        except TooSlow:
            known = True  # a violation already, of patternProperties
        if not known:
            yield from _field(validator, name, inner, wanted)


def _properties(
    validator: Any, wanted: Mapping[str, Any], value: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    for name, inner in wanted.items() if isinstance(value, dict) else ():
        if name in value:
            yield from _field(validator, name, value[name], inner)


def _field(validator: Any, name: str, value: Any, wanted: Any) -> Iterator[ValidationError]:
    """Check one field of an object; where it is forbidden, the package would not name it."""
    if wanted is False:
        yield ValidationError("should not be there", path=[name])
    else:
        yield from validator.descend(value, wanted, path=name)


def _required(
    validator: Any, names: Sequence[str], value: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    if isinstance(value, dict):
        yield from (ValidationError(f"has no {name}") for name in names if name not in value)


def _multiple_of(
    validator: Any, step: float, value: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    """Forgive a billionth: in binary, 0.3 is no exact multiple of 0.1."""
    if not _is_number(value):
        return
    count = value / step
    # A quotient from 2**53 on is whole, however it was rounded; one that is too large is infinite.
    if math.isfinite(count) and not math.isclose(count, round(count), abs_tol=1e-9):
        yield ValidationError(f"is no multiple of {step}")


def _format(
    validator: Any, name: str, value: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    if isinstance(value, str) and not has_format(value, name):
        yield ValidationError(f"is no {name}")


def _unique_items(
    validator: Any, wanted: bool, value: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    """Compare through a set, where the package may compare every item with every other."""
    if wanted and isinstance(value, list) and len({_identity(each) for each in value}) < len(value):
        yield ValidationError("has an item twice")


def _identity(value: Any) -> Any:
    """Return an equal, hashable thing for equal JSON values: 1 is 1.0, but not true."""
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, list):
        return ("array", *map(_identity, value))
    if isinstance(value, dict):
        return ("object", frozenset((name, _identity(each)) for name, each in value.items()))
    return value


def _is_number(value: Any) -> bool:
    """Return whether a value is a number to compute with: no boolean, finite, below 1e300."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 10**300
    return isinstance(value, float) and math.isfinite(value)


_Validator: Any = extend(  # type: ignore[no-untyped-call]  # its stub has no annotations
    Draft202012Validator,
    validators={
        "$ref": _reference,
        "pattern": _pattern,
        "properties": _properties,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "required": _required,
        "multipleOf": _multiple_of,
        "format": _format,
        "uniqueItems": _unique_items,
    },
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine_many(
        {
            "number": lambda _, value: _is_number(value),
            "integer": lambda _, value: _is_number(value) and float(value).is_integer(),
        }
    ),
)
