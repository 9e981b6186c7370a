"""Validate a conversation: roles, contents, tool calls and their order.

Does: give tool arguments one form. Refuse only what is certainly wrong; what a model's chat
template cannot render is found when it renders.
Does not: read files or render.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_ft.data.problems import shown

ROLES = ("system", "user", "assistant", "tool")
# What other conventions call them, ShareGPT's and its many descendants' among them.
OTHER_NAMES: Mapping[str, str] = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "developer": "system",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
}
TURN_EXAMPLES: Mapping[str, str] = {
    "messages": '{"role": "user", "content": "..."}',
    "conversations": '{"from": "human", "value": "..."}',
}
MAX_DEPTH = 32
UNPRINTABLE = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True)
class Complaint:
    """One fault inside a row.

    kind: the name that totals count.
    """

    kind: str
    found: str
    fix: str


def text_complaints(value: Any, place: str) -> Iterator[Complaint]:
    """Yield the parts of a JSON value, at any depth, that no tokenizer or template can take.

    That is: a NUL character, half of a surrogate pair, a number too large for a float, and nesting
    deeper than 32 levels.
    """
    pending: list[tuple[Any, int]] = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if depth > MAX_DEPTH:
            found = f"{place} is nested deeper than {MAX_DEPTH} levels"
            yield Complaint("nested too deeply", found, "flatten it")
            return
        if isinstance(item, str) and (bad := UNPRINTABLE.search(item)):
            name = "a NUL character" if bad[0] == "\x00" else "half of a surrogate pair"
            found = f"{place} contains {name} (character {bad.start() + 1})"
            yield Complaint("broken text", found, "remove the character")
        elif isinstance(item, float) and not math.isfinite(item):
            found = f"{place} contains a number that is too large"
            yield Complaint("broken number", found, "write it as text")
        elif isinstance(item, Mapping):
            pending.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list):
            pending.extend((part, depth + 1) for part in item)


def message_complaints(messages: Any, key: str = "messages") -> list[Complaint]:
    """Return all that is certainly wrong with a row's messages (any JSON value), which it has
    under `key`.
    """
    if not isinstance(messages, list) or not messages:
        found = f"{key} is {'empty' if messages == [] else _type_name(messages)}"
        fix = f"write a list such as [{TURN_EXAMPLES[key]}, ...]"
        return [Complaint(f"{key} not a list of turns", found, fix)]
    if complaints := list(text_complaints(messages, key)):
        return complaints
    for number, message in enumerate(messages, start=1):
        complaints.extend(_one_message(message, f"message {number}"))
    return complaints or _order_complaints(messages)


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _one_message(message: Any, place: str) -> Iterator[Complaint]:
    if not isinstance(message, dict):
        found = f"{place} is {_type_name(message)}"
        yield Complaint("message not an object", found, "write role and content")
        return
    role = message.get("role")
    if role not in ROLES:
        found = f"{place} has role {shown(role)}" if "role" in message else f"{place} has no role"
        meant = OTHER_NAMES.get(role.lower()) if isinstance(role, str) else None
        fix = f'write "{meant}"' if meant else f"use one of {', '.join(ROLES)}"
        yield Complaint("unknown role", found, fix)
        return
    yield from _content_complaints(message, role, place)
    if message.get("weight", 1) not in (1, None):
        found = f"{place} has weight {shown(message['weight'])}, and turns cannot be weighted"
        yield Complaint("weighted turn", found, "remove the weight, or the row")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if not isinstance(message.get(key), str | None):
            found = f"{place} has {key} as {_type_name(message[key])}"
            yield Complaint(f"{key} not text", found, "write it as text or remove it")


def _content_complaints(message: Mapping[str, Any], role: str, place: str) -> Iterator[Complaint]:
    content, calls = message.get("content"), message.get("tool_calls")
    has_calls = calls is not None and calls != []
    if has_calls and role != "assistant":
        found = f"{place} is from the {role} and has tool_calls"
        yield Complaint("tool calls of another role", found, "only the assistant calls tools")
    elif has_calls:
        yield from _call_complaints(calls, place)
    if content is None and not has_calls:
        found = f"{place} ({role}) has no content"
        yield Complaint("no content", found, "write its text, or remove the row")
    elif content is not None and not isinstance(content, str):
        found = f"{place} ({role}) has content as {_type_name(content)}"
        yield Complaint("content not text", found, "write the content as one text")
    elif role == "assistant" and not has_calls and not str(content).strip():
        found = f"{place} is an empty answer"
        yield Complaint("empty answer", found, "write the answer, or remove the row")


def _call_complaints(calls: Any, place: str) -> Iterator[Complaint]:
    fix = 'write [{"type": "function", "function": {"name": "...", "arguments": {...}}}]'
    if isinstance(calls, str):
        found = f"{place} calls {shown(calls)}, which is no JSON call"
        yield Complaint("broken tool call", found, fix)
        return
    if not isinstance(calls, list):
        yield Complaint("broken tool call", f"{place} has tool_calls as {_type_name(calls)}", fix)
        return
    for number, call in enumerate(calls, start=1):
        spot = f"{place}, tool call {number},"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            yield Complaint("broken tool call", f"{spot} names no function", fix)
            continue
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed_arguments(arguments)
        if not isinstance(arguments, dict):
            found = f"{spot} to {shown(function['name'])} has arguments that are not a JSON object"
            yield Complaint("broken tool call", found, fix)
        else:
            yield from text_complaints(arguments, f"{spot} arguments")


def refuse_constant(name: str) -> Any:
    """Raise ValueError for NaN and the infinities, which Python's parser takes for JSON."""
    raise ValueError(f"{name} is not JSON")


def _parsed_arguments(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return None


def _order_complaints(messages: Sequence[Mapping[str, Any]]) -> list[Complaint]:
    complaints = []
    roles = [message["role"] for message in messages]
    for number, role in enumerate(roles, start=1):
        before = roles[number - 2] if number > 1 else None
        if role == "tool" and before not in ("assistant", "tool"):
            follows = f"follows the {before}" if before else "comes first"
            found = f"message {number} is a tool's result but {follows}"
            fix = "put it after the assistant's call"
            complaints.append(Complaint("tool result out of place", found, fix))
    if roles[-1] != "assistant":
        found = f"the last message is from the {roles[-1]}, so there is no answer to learn"
        fix = "end the row with the assistant's answer, or remove it"
        complaints.append(Complaint("no answer at the end", found, fix))
    return complaints


def tools_complaints(tools: Any) -> list[Complaint]:
    """Return the faults of a row's `tools` value; null and [] mean no tools."""
    if tools is None or tools == []:
        return []
    fix = "write a list of objects, one a tool"
    if not isinstance(tools, list):
        return [Complaint("broken tools", f"tools is {_type_name(tools)}", fix)]
    if complaints := list(text_complaints(tools, "tools")):
        return complaints
    wrong = [n for n, tool in enumerate(tools, start=1) if not isinstance(tool, dict)]
    return [Complaint("broken tools", f"tool {n} is not an object", fix) for n in wrong]


def conversation_messages(conversations: Any) -> Any:
    """Return ShareGPT's `[{from, value}, ...]` as messages.

    Items of another form stay as they are, for `message_complaints` to name.
    """
    if not isinstance(conversations, list):
        return conversations
    return [
        _spoken_by(turn) if isinstance(turn, dict) and "from" in turn else turn
        for turn in conversations
    ]


def _spoken_by(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn as a message; keys that both forms may have stay, for the same checks."""
    speaker, value = turn["from"], turn.get("value")
    name = speaker.lower() if isinstance(speaker, str) else speaker
    role = OTHER_NAMES.get(name, name) if isinstance(name, str) else name
    message = {key: item for key, item in turn.items() if key not in ("from", "value")}
    if name == "function_call":
        return {**message, "role": role, "content": "", "tool_calls": _calls_of(value)}
    return {**message, "role": role, "content": value}


def _calls_of(value: Any) -> Any:
    """Return the calls in a function_call's value, as JSON or already read: one or a list.

    Any other value stays as it is, for `message_complaints` to name.
    """
    calls = _parsed_arguments(value) if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        return value
    return [
        {"function": call} if isinstance(call, dict) and "function" not in call else call
        for call in calls
    ]


def normal_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return checked messages with the arguments of every tool call as an object.

    OpenAI's form has them as JSON text, which some chat templates would quote a second time.
    Templates of Hugging Face models are written for objects.
    """
    return tuple(_normal_message(message) for message in messages)


def _normal_message(message: Mapping[str, Any]) -> dict[str, Any]:
    normal = {key: value for key, value in message.items() if value is not None and key != "weight"}
    if not normal.get("tool_calls"):
        normal.pop("tool_calls", None)
        return normal
    calls = []
    for call in normal["tool_calls"]:
        function = dict(call.get("function", call))
        arguments = function.get("arguments", {})
        function["arguments"] = (
            json.loads(arguments) if isinstance(arguments, str) else dict(arguments)
        )
        calls.append({**call, "function": function} if "function" in call else function)
    return {**normal, "content": normal.get("content", ""), "tool_calls": calls}
