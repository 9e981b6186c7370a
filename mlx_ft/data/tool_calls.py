"""Check that rows call functions that exist in the declared tool API.

Does: check JSON tool calls, and calls in Python code inside answers. Suggest the nearest right
name.
Does not: read the API (`tool_api.py`), run code, or judge code that calls nothing of the API.

A row with a call that does not exist teaches the model to make it.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_ft.data.rows import Row
from mlx_ft.data.tool_api import TYPES, Api, Function
from mlx_ft.text.python_code import open_brackets, parse_python

# Every fence is read, whatever its label: the end of one must not be taken for the start of
# another.
FENCE = re.compile(r"```[ \t]*(\w*)[^\n`]*\n(.*?)```", re.DOTALL)
PYTHON_LABELS = ("", "python", "py", "python3")
NEAR = 0.7
# Beyond these Python's parser gives up on some text, or takes its time.
MAX_CODE_CHARACTERS, MAX_BRACKETS = 100_000, 32
Said = tuple[str, str]


@dataclass(frozen=True)
class ApiFault:
    """One call that the API does not have, in the row of `line`."""

    line: int
    found: str
    fix: str


def check_rows(rows: Sequence[Row], api: Api) -> list[ApiFault]:
    """Return every call in the rows that the API does not have, in file order."""
    faults: list[ApiFault] = []
    for row in rows:
        answers = [m for m in row.messages or () if m["role"] == "assistant"]
        texts = [row.text or "", *(str(message["content"] or "") for message in answers)]
        trees = [tree for text in texts for tree in python_code(text)]
        # What one block of code defines or imports is there for the next.
        own = set(dir(builtins)).union(name for tree in trees for name, _ in _bound(tree))
        said: dict[Said, None] = {}  # a fault is told once a row
        for message in answers:
            said |= dict.fromkeys(_tool_call_faults(message.get("tool_calls") or (), api))
        for tree in trees:
            said |= dict.fromkeys(_code_faults(tree, api, own))
        faults += [ApiFault(row.line, found, fix) for found, fix in said]
    return faults


def python_code(answer: str) -> list[ast.Module]:
    """Return the Python code of an answer: fenced blocks, or the answer when it is code itself;
    and code in the string arguments of its calls, as in `execute_code(\"\"\"...\"\"\")`.
    """
    fenced = [code for label, code in FENCE.findall(answer) if label.lower() in PYTHON_LABELS]
    texts = fenced or [answer]
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
    """Return the code's tree if it is Python that calls something or gives names a meaning."""
    if len(text) > MAX_CODE_CHARACTERS or open_brackets(text) > MAX_BRACKETS:
        return None
    tree = parse_python(textwrap.dedent(text).strip())
    if tree is None:
        return None
    calls = any(isinstance(node, ast.Call) for node in ast.walk(tree))
    return tree if calls or any(_bound(tree)) else None


def _tool_call_faults(calls: Sequence[Any], api: Api) -> Iterator[Said]:
    for call in calls:
        function = call.get("function", call)
        name, arguments = str(function["name"]), function.get("arguments") or {}
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
        if kind == "null" and not function.arguments[name].required:
            continue  # the usual way to leave it out
        accepted = {*types, "integer"} if "number" in types else set(types)
        if kind is not None and types and kind not in accepted:
            yield (
                f"argument {name} of {function.name} is {_article(kind)}",
                f"it takes {_article(' or '.join(types))}",
            )
    for name, argument in function.arguments.items():
        if argument.required and name not in given:
            yield f"{function.name} is called without {name}", "give it"


def _article(kind: str) -> str:
    return f"{'an' if kind[:1] in 'aio' else 'a'} {kind}"


def _code_faults(tree: ast.Module, api: Api, own: Collection[str]) -> Iterator[Said]:
    """Yield the faults of code that calls the API, or what looks like it; `own` are names that the
    row's code brings itself.
    """
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    names = [name for name in (_dotted(call.func) for call in calls) if name]
    of_api = any(name in api for name in names)
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


def _bound(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Yield every name that the code gives a meaning, with the node that does it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield (alias.asname or alias.name).split(".")[0], node
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node
        elif isinstance(node, ast.arg):
            yield node.arg, node
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name, node
        elif isinstance(node, ast.MatchMapping) and node.rest:
            yield node.rest, node


def _dotted(node: ast.expr) -> str | None:
    """Return `a.b.c` of such an expression, None of any other."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else None


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


def _results(tree: ast.Module, api: Api) -> dict[str, Function]:
    """Return names that hold the result of one function of the API and never anything else."""
    plain = {
        id(node.targets[0]): _called(node.value, api)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and len(node.targets) == 1
    }
    results: dict[str, Function | None] = {}
    for name, node in _bound(tree):
        function = plain.get(id(node))
        results[name] = function if results.get(name, function) == function else None
    return {name: function for name, function in results.items() if function is not None}


def _attribute_faults(tree: ast.Module, api: Api) -> Iterator[Said]:
    """Yield attributes of results that the API does not give: `f().x`, or `r = f()` and `r.x`."""
    results = _results(tree, api)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
            continue
        value = node.value
        known = results.get(value.id) if isinstance(value, ast.Name) else _called(value, api)
        if known is None or known.returns is None or node.attr in known.returns:
            continue
        owner = value.id if isinstance(value, ast.Name) else f"{known.name}()"
        near = difflib.get_close_matches(node.attr, list(known.returns), n=1, cutoff=0.4)
        if near:
            hint = f"did you mean {owner}.{near[0]}?"
        else:
            hint = f"{known.name} gives {', '.join(sorted(known.returns)) or 'no attributes'}"
        yield f"attribute {owner}.{node.attr} is not in the API", hint


def _called(node: ast.expr, api: Api) -> Function | None:
    if isinstance(node, ast.Await):
        node = node.value
    if not isinstance(node, ast.Call):
        return None
    name = _dotted(node.func)
    return None if name is None else api.get(name)
