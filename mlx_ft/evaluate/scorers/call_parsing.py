"""Find tool calls in free text: in the wrapper, bare, as JSON, or in tags.

Does: parse text into calls with constant arguments; positional arguments get the names that the
tool declares. Does not: execute anything, or know the calls wanted.
The text is a model's and may be anything. Sizes, nesting and attempts are limited, and a text that
Python's parser gives up on is a text without calls.
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_ft.text.python_code import open_brackets, parse_python

MAX_CODE_CHARACTERS = 8_192
MAX_OPEN_BRACKETS = 24
MAX_PARSE_ATTEMPTS = 48
# No tool, but models wrap calls in it.
PRINT = "print"

Tools = Mapping[str, Sequence[str]]
_STRING = re.compile(r"""(\"{3}|'{3}|"|')(?:\\.|(?!\1).)*\1""", re.DOTALL)
_JSON_START = re.compile(r"[\[{]")
# Each stops at the next opening tag, so that a thousand of them are not read a thousand times.
_FUNCTION_TAG = re.compile(r"<function=([\w.]+)>((?:(?!<function=).)*?)</function>", re.DOTALL)
_PARAMETER_TAG = re.compile(
    r"<parameter=(\w+)>\n?((?:(?!<parameter=).)*?)\n?</parameter>", re.DOTALL
)


@dataclass(frozen=True)
class Expression:
    """An argument that is no string, number or boolean.

    source: the argument as it was written
    """

    source: str


Value = str | int | float | bool | Expression


@dataclass(frozen=True)
class Call:
    """One call.

    name: the function's name
    arguments: values by parameter name; an argument that fits no parameter has a name that no
        parameter can have (`#3`, `**`, `path#2`)
    """

    name: str
    arguments: Mapping[str, Value]

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal and hashable for calls that do the same: 1 is 1.0, but 1 is not true."""
        values = [(name, _kind(value), value) for name, value in self.arguments.items()]
        return (self.name, tuple(sorted(values, key=lambda entry: entry[0])))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={written(v)}' for k, v in self.arguments.items())})"


@dataclass(frozen=True)
class FoundCalls:
    """Calls found in a text.

    calls: the calls, in the order written
    alone: no other text or code stands around them
    """

    calls: tuple[Call, ...]
    alone: bool


def written(value: Value) -> str:
    """Return a value as it is written in a call."""
    if isinstance(value, Expression):
        return value.source
    return json.dumps(value, ensure_ascii=False)


def same_value(one: Value, other: Value) -> bool:
    """Return whether two arguments are equal, where 1 is 1.0 but neither true nor "1"."""
    return _kind(one) == _kind(other) and one == other


def wrapped_calls(text: str, wrapper: str, tools: Tools) -> FoundCalls | None:
    """Return the calls inside `wrapper("...")` if the whole text consists of such statements.

    Each statement is the wrapper's call with one string, optionally assigned to a name. The string
    is Python; the calls are `alone` when it holds plain calls only. None when the text has another
    form.
    """
    tree = _parse(text)
    if tree is None or not tree.body:
        return None
    inner = []
    for statement in tree.body:
        call = _plain_call(statement)
        code = _only_string(call) if call is not None else None
        if call is None or _function_name(call) != wrapper or code is None:
            return None
        body = _parse(code)
        if body is None:
            return None
        inner.append(_calls_in(body, tools))
    calls = tuple(call for found in inner for call in found.calls)
    return FoundCalls(calls, all(found.alone for found in inner))


def embedded_wrapper_calls(text: str, wrapper: str, tools: Tools) -> FoundCalls | None:
    """Return the calls of every well-formed `wrapper("...")` somewhere in the text, or None."""
    calls: list[Call] = []
    for source in _call_sources(text, [wrapper]):
        found = wrapped_calls(source, wrapper, tools)
        if found is not None:
            calls += found.calls
    return FoundCalls(tuple(calls), False) if calls else None


def unwrapped_calls(text: str, wrapper: str, tools: Tools) -> FoundCalls | None:
    """Return the calls that the text makes without the wrapper, or None when there are none.

    Three readings are tried. First: JSON or tags in the usual tool-call formats. Second: the text,
    or the code in its ``` fence, as Python; strings given to unknown functions are read, too.
    Third: declared tools called anywhere in the text. The first reading that has a declared tool
    counts, else the first that has a call.
    """
    readings = [
        _structured_calls(text, wrapper, tools),
        _python_calls(_unfenced(text), tools),
        _scattered_calls(text, tools),
    ]
    found = [calls for calls in readings if calls]
    known = [calls for calls in found if any(call.name in tools for call in calls)]
    best = next(iter(known or found), None)
    return None if best is None else FoundCalls(tuple(best), False)


def attempts_a_call(text: str, wrapper: str, tools: Tools) -> bool:
    """Return whether the text looks like a call that could not be read, rather than prose."""
    names = "|".join(re.escape(name) for name in [wrapper, *tools])
    pattern = rf"(?<!\w)({names})\s*\(|<tool_call|<function=|\"name\"\s*:|^\s*(```|[\[{{])"
    return re.search(pattern, text) is not None


def _kind(value: Value) -> str:
    if isinstance(value, bool):
        return "bool"
    return "number" if isinstance(value, int | float) else type(value).__name__


def _parse(source: str) -> ast.Module | None:
    source = textwrap.dedent(source).strip()
    if len(source) > MAX_CODE_CHARACTERS:
        return None
    if open_brackets(_STRING.sub("", source)) > MAX_OPEN_BRACKETS:
        return None
    return parse_python(source)


def _plain_call(statement: ast.stmt) -> ast.Call | None:
    """Return the call of a statement that is `f(...)` or `name = f(...)`."""
    value: ast.expr | None = None
    if isinstance(statement, ast.Expr):
        value = statement.value
    elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        value = statement.value if len(statement.targets) == 1 else None
    return value if isinstance(value, ast.Call) and _function_name(value) else None


def _function_name(call: ast.Call) -> str | None:
    return call.func.id if isinstance(call.func, ast.Name) else None


def _only_string(call: ast.Call) -> str | None:
    if call.keywords or len(call.args) != 1 or not isinstance(call.args[0], ast.Constant):
        return None
    value = call.args[0].value
    return value if isinstance(value, str) else None


def _calls_in(tree: ast.Module, tools: Tools) -> FoundCalls:
    """Return all plain calls, and the calls of declared tools anywhere else."""
    calls: list[Call] = []
    alone = True
    for statement in tree.body:
        call = _plain_call(statement)
        if call is not None and _function_name(call) != PRINT:
            calls.append(_call(call, tools))
            continue
        alone = False
        nested = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
        nested.sort(key=lambda node: (node.lineno, node.col_offset))
        calls += [_call(node, tools) for node in nested if _function_name(node) in tools]
    return FoundCalls(tuple(calls), alone)


def _call(node: ast.Call, tools: Tools) -> Call:
    name = _function_name(node) or ""
    parameters = tools.get(name, ())
    arguments: dict[str, Value] = {}
    for index, value in enumerate(node.args):
        known = index < len(parameters) and not isinstance(value, ast.Starred)
        arguments[parameters[index] if known else f"#{index + 1}"] = _value(value)
    for keyword in node.keywords:
        key = keyword.arg or "**"
        arguments[f"{key}#2" if key in arguments else key] = _value(keyword.value)
    return Call(name, arguments)


def _value(node: ast.expr) -> Value:
    sign, constant = 1, node
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, constant = -1, node.operand
    if isinstance(constant, ast.Constant):
        value = constant.value
        if sign == 1 and isinstance(value, str | bool):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return sign * value
    return Expression(_unparsed(node))


def _unparsed(node: ast.expr) -> str:
    try:
        return ast.unparse(node)
    except (RecursionError, ValueError):
        return "..."


def _call_sources(text: str, names: Sequence[str]) -> Iterator[str]:
    """Yield the source of each call of one of `names` in a text, if Python can parse it."""
    pattern = re.compile(rf"(?<![\w.])({'|'.join(re.escape(name) for name in names)})\s*\(")
    attempts = position = 0
    while (match := pattern.search(text, position)) is not None:
        position = match.end()
        end = position
        while attempts < MAX_PARSE_ATTEMPTS and (end := text.find(")", end) + 1):
            attempts += 1
            tree = _parse(text[match.start() : end])
            if tree is not None and isinstance(tree.body[0], ast.Expr):
                yield text[match.start() : end]
                position = end
                break


def _scattered_calls(text: str, tools: Tools) -> list[Call]:
    trees = (_parse(source) for source in _call_sources(text, list(tools)))
    return [call for tree in trees if tree for call in _calls_in(tree, tools).calls]


def _unfenced(text: str) -> str:
    match = re.search(r"```\w*\s*\n(.*?)(```|\Z)", text, re.DOTALL)
    return match.group(1) if match else text


def _python_calls(text: str, tools: Tools) -> list[Call]:
    tree = _parse(text)
    calls: list[Call] = []
    for call in _calls_in(tree, tools).calls if tree else ():
        strings = [value for value in call.arguments.values() if isinstance(value, str)]
        inner = _parse(strings[0]) if call.name not in tools and len(strings) == 1 else None
        inside = _calls_in(inner, tools).calls if inner else ()
        calls += inside or (call,)
    return calls


def _structured_calls(text: str, wrapper: str, tools: Tools) -> list[Call]:
    """Return calls written as JSON objects with a name and arguments, or as <function=...> tags."""
    raw = [found for value in json_values(text) for found in named_calls(value)]
    for name, body in _FUNCTION_TAG.findall(text):
        parameters = _PARAMETER_TAG.findall(body)
        raw.append((name, dict(parameters)))
    calls: list[Call] = []
    for name, arguments in raw:
        values = list(arguments.values())
        if name == wrapper and len(values) == 1 and isinstance(values[0], str):
            inner = _parse(values[0])
            calls += _calls_in(inner, tools).calls if inner else ()
        else:
            calls.append(Call(name, {str(k): _json_value(v) for k, v in arguments.items()}))
    return calls


def json_values(text: str) -> list[Any]:
    """Return the JSON objects and arrays that stand in a text, one after the other."""
    decoder = json.JSONDecoder()
    values = []
    position = 0
    for _ in range(MAX_PARSE_ATTEMPTS):
        match = _JSON_START.search(text, position)
        if match is None:
            break
        try:
            value, position = decoder.raw_decode(text, match.start())
            values.append(value)
        except (ValueError, RecursionError):
            position = match.end()
    return values


def named_calls(value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (name, arguments) of a JSON value in one of the usual shapes of tool calls."""
    if isinstance(value, list):
        return [call for item in value[:MAX_PARSE_ATTEMPTS] for call in _flat_call(item)]
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
        return named_calls(value["tool_calls"])
    return _flat_call(value)


def _flat_call(value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return []
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        parsed = json_values(arguments)
        arguments = parsed[0] if len(parsed) == 1 else arguments
    return [(value["name"], arguments)] if isinstance(arguments, dict) else []


def _json_value(value: Any) -> Value:
    if isinstance(value, str | int | float):
        return value
    return Expression(json.dumps(value, ensure_ascii=False))
