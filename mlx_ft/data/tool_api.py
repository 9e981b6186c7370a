"""Do the training rows call an API that exists?

Does: read a list of functions with their arguments and what their results have; check JSON tool
calls, and calls in Python code inside answers, against it; name the nearest right name. Does not:
run code, or judge code that calls nothing of the API.

A row that calls what is not there teaches a model to do so for good.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ft.data.formats import Row
from mlx_ft.errors import DataError, Fault
from mlx_ft.strict_yaml import label_of, read_text, read_yaml

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
FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
OPTIONAL = "optional "
NEAR = 0.7
MAX_CODE_CHARACTERS = 100_000


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


@dataclass(frozen=True)
class ApiFault:
    """One call that the API does not have, in the row of `line`."""

    line: int
    found: str
    fix: str


Api = Mapping[str, Function]


def read_api(path: Path) -> Api:
    """Read a YAML or JSON list of functions; DataError with all that is wrong with it.

    Each is `{name, arguments, returns}` with arguments as `{name: type}` (or `optional
    type`, or `any`), or a tool as chat templates take it, `{type: function, function: {name,
    parameters}}`, with JSON schema parameters and perhaps `returns`.
    """
    label = label_of(path)
    text, unreadable = read_text(path)
    reading = read_yaml(text, label)
    if unreadable or reading.faults:
        raise DataError(unreadable or reading.faults)
    value = reading.value
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
    if "parameters" in item:
        arguments = _schema_arguments(item["name"], item["parameters"])
    else:
        arguments = _plain_arguments(item["name"], item.get("arguments") or {})
    return Function(item["name"], arguments, None if returns is None else frozenset(returns))


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


def check_rows(rows: Sequence[Row], api: Api) -> list[ApiFault]:
    """Return every call in the rows that the API does not have, in file order."""
    faults: list[ApiFault] = []
    for row in rows:
        said: dict[tuple[str, str], None] = {}  # a fault is told once a row
        for message in row.messages or ():
            if message["role"] == "assistant":
                said |= dict.fromkeys(_tool_call_faults(message.get("tool_calls") or (), api))
                for tree in python_code(str(message["content"] or "")):
                    said |= dict.fromkeys(_code_faults(tree, api))
        for tree in python_code(row.text or ""):
            said |= dict.fromkeys(_code_faults(tree, api))
        faults += [ApiFault(row.line, found, fix) for found, fix in said]
    return faults


def python_code(answer: str) -> list[ast.Module]:
    """Return the Python code of an answer: fenced blocks, or the answer when it is code itself;
    and code in the string arguments of its calls, as in `execute_code(\"\"\"...\"\"\")`.
    """
    texts = FENCE.findall(answer) or [answer]
    trees = []
    while texts:
        text = texts.pop(0)
        tree = _parsed(text)
        if tree is None:
            continue
        trees.append(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                texts += _texts_of(node)
    return trees


def _texts_of(call: ast.Call) -> list[str]:
    nodes = [*call.args, *(keyword.value for keyword in call.keywords)]
    values = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return [value for value in values if isinstance(value, str)]


def _parsed(text: str) -> ast.Module | None:
    """Return the code's tree if it is Python that calls something."""
    if "(" not in text or len(text) > MAX_CODE_CHARACTERS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the row's code, such as an unknown escape
            tree = ast.parse(text.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree if any(isinstance(node, ast.Call) for node in ast.walk(tree)) else None


Said = tuple[str, str]


def _tool_call_faults(calls: Sequence[Any], api: Api) -> Iterator[Said]:
    for call in calls:
        function = call.get("function", call)
        name, arguments = str(function["name"]), function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if name not in api:
            yield _unknown("function", name, api)
            continue
        given = {key: _json_type(value) for key, value in arguments.items()}
        yield from _argument_faults(api[name], given)


def _json_type(value: Any) -> str | None:
    return next(
        (
            kind
            for kind, types in TYPES.items()
            if isinstance(value, types) and isinstance(value, bool) == (kind == "boolean")
        ),
        None,
    )


def _unknown(what: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> Said:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    there = ", ".join(sorted(known)) or "none"
    hint = f"did you mean {near[0]}?" if near else f"the API has {there}"
    return f"{what} {name} is not in the API", hint


def _argument_faults(function: Function, given: Mapping[str, str | None]) -> Iterator[Said]:
    """Yield what is wrong with arguments, given as name to JSON type (None: not known)."""
    for name, kind in given.items():
        if name not in function.arguments:
            _, hint = _unknown("argument", name, function.arguments)
            yield f"{function.name} has no argument {name}", hint
            continue
        types = function.arguments[name].types
        accepted = {*types, "integer"} if "number" in types else set(types)
        if kind is not None and types and kind not in accepted:
            yield (
                f"argument {name} of {function.name} is {_article(kind or '')}",
                f"it takes {_article(' or '.join(types))}",
            )
    for name, argument in function.arguments.items():
        if argument.required and name not in given:
            yield f"{function.name} is called without {name}", "give it"


def _article(kind: str) -> str:
    return f"{'an' if kind[:1] in 'aio' else 'a'} {kind}"


def _code_faults(tree: ast.Module, api: Api) -> Iterator[Said]:
    """Yield the faults of code that calls the API, or what looks like it."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    names = [name for name in (_dotted(call.func) for call in calls) if name]
    of_api = any(name in api for name in names)
    own = _own_names(tree)
    for call in calls:
        name = _dotted(call.func)
        if name is None:
            continue
        if name in api:
            yield from _argument_faults(api[name], _given(call, api[name]))
        elif name.split(".")[0] not in own and (
            (of_api and "." not in name)
            or difflib.get_close_matches(name, list(api), n=1, cutoff=NEAR)
        ):
            yield _unknown("function", name, api)
    yield from _attribute_faults(tree, api)


def _own_names(tree: ast.Module) -> set[str]:
    """Return names that the code brings itself: builtins, imports, definitions, assignments."""
    names = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return None if before is None else f"{before}.{node.attr}"
    return None


def _given(call: ast.Call, function: Function) -> dict[str, str | None]:
    """Return the arguments of a call, by name, with their types where they are constants."""
    order = list(function.arguments)
    given: dict[str, str | None] = {}
    for index, node in enumerate(call.args):
        if isinstance(node, ast.Starred):
            return dict.fromkeys(order)
        name = order[index] if index < len(order) else f"number {index + 1}"
        given[name] = _literal_type(node)
    for keyword in call.keywords:
        if keyword.arg is None:
            return dict.fromkeys(order)
        given[keyword.arg] = _literal_type(keyword.value)
    return given


def _literal_type(node: ast.expr) -> str | None:
    try:
        return _json_type(ast.literal_eval(node))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _attribute_faults(tree: ast.Module, api: Api) -> Iterator[Said]:
    """Yield attributes of results that the API does not give: `f().x`, or `r = f()` and `r.x`."""
    results: dict[str, Function | None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            if isinstance(target, ast.Name):
                function = _called(node.value, api)
                # A name that is assigned twice, from different functions, may be either.
                same = target.id not in results or results[target.id] == function
                results[target.id] = function if same else None
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
            continue
        value = node.value
        known = results.get(value.id) if isinstance(value, ast.Name) else _called(value, api)
        if known is None or known.returns is None or node.attr in known.returns:
            continue
        owner = value.id if isinstance(value, ast.Name) else f"{known.name}()"
        found, hint = _unknown("attribute", f"{owner}.{node.attr}", [])
        near = difflib.get_close_matches(node.attr, list(known.returns), n=1, cutoff=0.4)
        if near:
            hint = f"did you mean {owner}.{near[0]}?"
        else:
            hint = f"{known.name} gives {', '.join(sorted(known.returns)) or 'no attributes'}"
        yield found, hint


def _called(node: ast.expr, api: Api) -> Function | None:
    if isinstance(node, ast.Await):
        node = node.value
    if not isinstance(node, ast.Call):
        return None
    name = _dotted(node.func)
    return None if name is None else api.get(name)
