"""Model-specific tool-call formats, read by mlx-lm's own tool parsers.

Does: find the marked parts of a text and parse them; read bare JSON where nothing is marked.
Does not: import mlx_lm, which would load MLX. Its parsers are plain Python files, loaded here as a
package of their own.
The text is a model's and may be anything. Sizes and nesting are limited, and a text that makes a
parser raise is a text without calls.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlx_ft.evaluate.scorers.call_parsing import json_values, named_calls
from mlx_ft.text.python_code import open_brackets

PACKAGE = "_mlx_lm_tool_parsers"
AUTO, JSON = "auto", "json"
MAX_PART_CHARACTERS = 8_192
MAX_OPEN_BRACKETS = 24
MAX_PARTS = 32
# Names, operators and tags that Python or a parser would otherwise nest as deep as they are long.
_DEEP = re.compile(r"[-+~]{24}|(?:\bnot\s+){24}|(?:\blambda\b[^:]{0,9}:\s*){24}")
# Parsers that share their marks take each other's calls for very strange names.
_NAME = re.compile(r"[\w.:/-]{1,128}")
_ATTEMPT = re.compile(
    r"<tool_call|<function=|<start_function_call>|\[TOOL_CALLS\]|<\|?tool_call|"
    r"^\s*[\[{]+\s*\"(?:name|function|tool_calls)\"\s*:"
)


@dataclass(frozen=True)
class ToolFormat:
    """One of mlx-lm's tool parsers.

    name: the parser's module
    start, end: the marks around a call (`end` may be "")
    parse: the function that reads the text between the marks
    """

    name: str
    start: str
    end: str
    parse: Callable[..., Any]


@dataclass(frozen=True)
class FoundToolCall:
    """A call as it was parsed; `arguments` are JSON values."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class FoundToolCalls:
    """Calls found in a text.

    calls: the calls, in their order
    in_format: they are in the format that was asked for
    """

    calls: tuple[FoundToolCall, ...]
    in_format: bool


def format_names() -> tuple[str, ...]:
    """Return the formats that a suite may name: auto, json, and mlx-lm's parsers."""
    return (AUTO, JSON, *tool_formats())


@cache
def tool_formats() -> Mapping[str, ToolFormat]:
    """Return mlx-lm's tool parsers by name; a file that cannot be used is left out."""
    spec = importlib.util.find_spec("mlx_lm")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    folder = next((p for place in places if (p := Path(place) / "tool_parsers").is_dir()), None)
    if folder is None:
        return {}
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    # The plainest first: formats that share their marks are tried in this order.
    names.sort(key=lambda name: name != "json_tools")
    found = {name: _load(folder, name) for name in names}
    return {name: each for name, each in found.items() if each is not None}


def _load(folder: Path, name: str) -> ToolFormat | None:
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    try:
        module = importlib.import_module(f"{PACKAGE}.{name}")
        return ToolFormat(
            name, module.tool_call_start, module.tool_call_end, module.parse_tool_call
        )
    except (ImportError, AttributeError):
        return None


def found_calls(text: str, form: str, tools: Sequence[Mapping[str, Any]]) -> FoundToolCalls | None:
    """Return the calls in a text, or None; calls in the format asked for come before others."""
    wanted = [each for each in tool_formats().values() if form in (AUTO, each.name)]
    if form == JSON:
        calls = _whole_json(text)
        if calls:
            return FoundToolCalls(calls, True)
    for group in (wanted, [each for each in tool_formats().values() if each not in wanted]):
        for each in group:
            calls = _marked_calls(text, each, tools)
            if calls:
                return FoundToolCalls(calls, each in wanted)
    calls = _bare_json(text)
    return FoundToolCalls(calls, False) if calls else None


def looks_like_a_call(text: str) -> bool:
    """Return whether a text seems to be a call that could not be read, rather than prose."""
    return _ATTEMPT.search(text) is not None


def _marked_calls(
    text: str, form: ToolFormat, tools: Sequence[Mapping[str, Any]]
) -> tuple[FoundToolCall, ...]:
    calls: list[FoundToolCall] = []
    for part in _parts(text, form):
        calls += _parsed(part, form, tools)
    return tuple(calls)


def _parts(text: str, form: ToolFormat) -> Iterator[str]:
    """Yield the text between the marks; where the end mark is missing, up to the text's end."""
    position = 0
    for _ in range(MAX_PARTS):
        start = text.find(form.start, position)
        if start < 0:
            return
        begin = start + len(form.start)
        end = text.find(form.end, begin) if form.end else -1
        end = len(text) if end < 0 else end
        yield text[begin:end]
        position = max(end, begin)


def _parsed(
    part: str, form: ToolFormat, tools: Sequence[Mapping[str, Any]]
) -> Iterator[FoundToolCall]:
    if len(part) > MAX_PART_CHARACTERS or open_brackets(part) > MAX_OPEN_BRACKETS:
        return
    if _DEEP.search(part):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = form.parse(part, [dict(tool) for tool in tools] or None)
    except Exception:  # mlx-lm's parsers raise anything on a text that is none of theirs
        return
    for call in found if isinstance(found, list) else [found]:
        fields = call if isinstance(call, dict) else {}
        name, arguments = fields.get("name"), fields.get("arguments", fields.get("parameters"))
        if isinstance(arguments, str):
            arguments = _object(arguments)
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            continue
        if isinstance(arguments, dict):
            yield FoundToolCall(name, {str(key): value for key, value in arguments.items()})


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _whole_json(text: str) -> tuple[FoundToolCall, ...]:
    """Return the calls of a text that is JSON as a whole."""
    value = _object(text) if open_brackets(text) <= MAX_OPEN_BRACKETS else None
    return tuple(FoundToolCall(name, dict(arguments)) for name, arguments in named_calls(value))


def _bare_json(text: str) -> tuple[FoundToolCall, ...]:
    values = json_values(text[:MAX_PART_CHARACTERS])
    named = [call for value in values for call in named_calls(value)]
    return tuple(FoundToolCall(name, dict(arguments)) for name, arguments in named[:MAX_PARTS])
