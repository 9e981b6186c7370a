"""Read the declared tool API: functions, their arguments and results.

Does not: look at rows (`tool_calls.py`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ft.data.messages import refuse_constant, text_complaints
from mlx_ft.data.problems import shown
from mlx_ft.errors import DataError, Fault
from mlx_ft.recipe.strict_yaml import label_of, read_text, read_yaml

# JSON schema's types and what they are in Python; bool is an int there, and must not pass as one.
TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (dict,),
    "null": (type(None),),
}
OPTIONAL = "optional "
# Where arguments are: ours, then JSON schema in OpenAI's, MCP's and Anthropic's spelling.
ARGUMENTS = ("arguments", "parameters", "inputSchema", "input_schema")
# What a tool may have besides, and what says nothing about how it is called.
OTHER_KEYS = (
    *("name", "returns", "return", "description", "title", "type", "strict", "annotations"),
    *("outputSchema", "output_schema", "execution", "icons", "_meta", "meta"),
    *("cache_control", "input_examples", "defer_loading", "allowed_callers"),
)


@dataclass(frozen=True)
class Argument:
    """One argument: the JSON schema types it may have (none given: any), and whether it must be."""

    types: tuple[str, ...]
    required: bool


@dataclass(frozen=True)
class Function:
    """One function: arguments in order; `returns` are its result's attributes, None for unknown."""

    name: str
    arguments: Mapping[str, Argument]
    returns: frozenset[str] | None


Api = Mapping[str, Function]


def read_api(path: Path) -> Api:
    """Read a YAML or JSON list of functions; DataError with all that is wrong with it.

    Each is `{name, arguments, returns}` with arguments as `{name: type}` (or `optional
    type`, or `any`), or a tool as chat templates and APIs take it, with its arguments as a JSON
    schema and perhaps `returns`.
    """
    label = label_of(path)
    text, unreadable = read_text(path)
    if unreadable:
        raise DataError(unreadable)
    value = _json(text, label) if path.suffix.lower() == ".json" else _yaml(text, label)
    if isinstance(value, Mapping):
        value = value.get("tools", value.get("functions"))
    if not isinstance(value, list) or not value:
        raise DataError(Fault(label, "not a list of functions", "write `- name: ...` items"))
    functions, faults = [], []
    for number, item in enumerate(value, 1):
        try:
            functions.append(_function(item))
        except (TypeError, ValueError) as error:
            where = f"{label}, function {number}"
            faults.append(Fault(where, str(error), "write name, arguments, returns"))
    twice = sorted({f.name for f in functions if sum(f.name == g.name for g in functions) > 1})
    faults += [Fault(label, f"{name} is there twice", "keep one") for name in twice]
    if faults:
        raise DataError(faults)
    return {function.name: function for function in functions}


def _yaml(text: str, label: str) -> Any:
    reading = read_yaml(text, label, multiline=True)
    if reading.faults:
        raise DataError(reading.faults)
    return reading.value


def _json(text: str, label: str) -> Any:
    try:
        value = json.loads(text, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        fault = Fault(f"{label}:{error.lineno}", f"not valid JSON ({error.msg})", "correct it")
        raise DataError(fault) from error
    except (ValueError, RecursionError) as error:
        raise DataError(Fault(label, f"not valid JSON ({error})", "correct it")) from error
    if complaints := list(text_complaints(value, "the list")):
        raise DataError([Fault(label, each.found, each.fix) for each in complaints])
    return value


def _function(item: Any) -> Function:
    if isinstance(item, Mapping) and isinstance(item.get("function"), Mapping):
        item = item["function"]
    if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
        raise ValueError("a function without a name")
    returns = item.get("returns")
    if isinstance(returns, Mapping):
        returns = list(returns.get("properties", returns))
    if returns is not None and not (
        isinstance(returns, list) and all(isinstance(name, str) for name in returns)
    ):
        raise ValueError(f"returns of {item['name']} is not a list of attribute names")
    given = _arguments_key(item)
    if given == ARGUMENTS[0]:
        arguments = _plain_arguments(item["name"], item.get(given) or {})
    else:
        arguments = _schema_arguments(item["name"], item[given])
    for name in (item["name"], *arguments, *(returns or ())):
        if not name.isprintable():
            raise ValueError(f"{shown(name)} cannot be a name")
    return Function(item["name"], arguments, None if returns is None else frozenset(returns))


def _arguments_key(item: Mapping[Any, Any]) -> str:
    """Return the key that an item's arguments are under; ValueError for any that nobody knows."""
    known = (*ARGUMENTS, *OTHER_KEYS)
    for key in item:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(ARGUMENTS)}, returns"
            raise ValueError(f"{item['name']} has an unknown key {shown(key)}; {hint}")
    given = [key for key in ARGUMENTS if key in item]
    if len(given) > 1:
        raise ValueError(f"{item['name']} has both {given[0]} and {given[1]}")
    return given[0] if given else ARGUMENTS[0]


def _schema_arguments(name: str, schema: Any) -> dict[str, Argument]:
    schema = schema or {}
    if not isinstance(schema, Mapping) or not isinstance(schema.get("properties", {}), Mapping):
        raise ValueError(f"parameters of {name} are not a JSON schema of an object")
    properties, required = schema.get("properties", {}), schema.get("required") or ()
    arguments = {}
    for key, value in properties.items():
        kinds = value.get("type", ()) if isinstance(value, Mapping) else ()
        arguments[str(key)] = _argument(name, str(key), kinds, key in required)
    return arguments


def _plain_arguments(name: str, given: Any) -> dict[str, Argument]:
    if isinstance(given, list):
        given = dict.fromkeys(given, "any")
    if not isinstance(given, Mapping):
        raise ValueError(f"arguments of {name} are neither a mapping nor a list")
    arguments = {}
    for key, kind in given.items():
        text = str(kind)
        name_of_type = text.removeprefix(OPTIONAL)
        kinds = () if name_of_type == "any" else name_of_type
        arguments[str(key)] = _argument(name, str(key), kinds, not text.startswith(OPTIONAL))
    return arguments


def _argument(function: str, name: str, kinds: Any, required: bool) -> Argument:
    types = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in types:
        if kind not in TYPES:
            known = ", ".join(TYPES)
            raise ValueError(f"argument {name} of {function} is of type {kind!r}, not {known}")
    return Argument(types, required)
