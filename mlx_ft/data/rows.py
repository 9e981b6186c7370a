"""Row and FileRows: the typed, checked rows of a file, in five forms.

Does: recognise each row's form, and collect all errors with their line numbers.
Does not: parse files (`files.py`), choose among rows (`field_mapping.py`), render, tokenize,
repair, or fetch anything.

The forms: `messages` (with `tools`), ShareGPT's `conversations`, `prompt` and `completion`,
`instruction`, `input` and `output`, and plain `text`. Of the other keys only `category` is read,
and those that a recipe names. Blank lines are ignored.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_ft.data.field_mapping import NO_KEYS, RowKeys, refusal, renamed, weight_and_order
from mlx_ft.data.files import read_items
from mlx_ft.data.messages import (
    Complaint,
    conversation_messages,
    message_complaints,
    normal_messages,
    text_complaints,
    tools_complaints,
)
from mlx_ft.data.problems import Problem, shown

Form = Literal["messages", "conversations", "prompt/completion", "instruction/output", "text"]
THINKING_MARK = "<think>"
FORMS = "messages, conversations, prompt and completion, instruction and output, or text"


@dataclass(frozen=True)
class Row:
    """One training row: `messages` to be rendered, or plain `text`, never both.

    line: 1-based; in a file without lines, the row's number.
    form: as the file has it. Every conversation is already messages here.
    """

    line: int
    form: Form
    messages: tuple[Mapping[str, Any], ...] | None
    text: str | None
    tools: tuple[Mapping[str, Any], ...] | None
    category: str | None
    weight: float = 1.0
    order: float | str | None = None


@dataclass(frozen=True)
class LeftOut:
    """Rows that the recipe leaves out, by their lines, and why: "whose score is below 3"."""

    why: str
    lines: tuple[int, ...]


@dataclass(frozen=True)
class FileRows:
    """The good rows of a file in their order, everything that is wrong with the others, and those
    that the recipe leaves out.
    """

    path: Path
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    left_out: tuple[LeftOut, ...] = ()


def calls_text(message: Mapping[str, Any]) -> str:
    """Return a message's tool calls as text: names and arguments, without ids, which are chance."""
    functions = [call.get("function", call) for call in message.get("tool_calls") or ()]
    return "".join(
        f" {function['name']}"
        + json.dumps(function.get("arguments"), ensure_ascii=False, sort_keys=True)
        for function in functions
    )


def texts_of(row: Row) -> list[str]:
    """Return the texts of all messages of a row."""
    return [row.text or ""] if row.messages is None else [m["content"] for m in row.messages]


def thinks(row: Row) -> bool:
    """Return whether an answer of the row shows its reasoning."""
    if row.messages is None:
        return THINKING_MARK in (row.text or "")
    return any(
        message["role"] == "assistant"
        and (THINKING_MARK in message["content"] or bool(message.get("reasoning_content")))
        for message in row.messages
    )


def said(row: Row) -> str:
    """Return the text by which rows are compared.

    System messages are left out (`said_by_system`): many rows share a long one, and would all be
    nearly equal.
    """
    if row.messages is None:
        return row.text or ""
    return "\n".join(
        f"{message['role']}: {message['content']}{calls_text(message)}"
        for message in row.messages
        if message["role"] != "system"
    )


def said_by_system(row: Row) -> str:
    """Return a row's system messages, which tell rows apart that are else alike: a text to classify
    may stand there.
    """
    return "\n".join(m["content"] for m in row.messages or () if m["role"] == "system")


def read_rows(path: Path, keys: RowKeys = NO_KEYS) -> FileRows:
    """Read a file of rows; list problems, and raise nothing.

    keys: the keys that a recipe names.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    left_out: dict[str, list[int]] = {}
    try:
        for line, complaint, value in read_items(path):
            row, complaints = None, [] if complaint is None else [complaint]
            if complaint is None:
                complaints, reason = refusal(value, keys)
                if reason is not None:
                    left_out.setdefault(reason, []).append(line)
                elif not complaints:
                    complaints, row = _read_row(line, value, keys)
            problems.extend(Problem(path, line, c.kind, c.found, c.fix) for c in complaints)
            if row is not None:
                rows.append(row)
    except OSError as error:
        found = f"cannot be read ({error.strerror or error})"
        problems.append(Problem(path, None, "cannot be read", found, "check the file"))
        return FileRows(path, (), tuple(problems))
    gone = tuple(LeftOut(why, tuple(lines)) for why, lines in left_out.items())
    if not rows and not problems:
        found, fix = "there are no rows in it", "write one row a line"
        if gone:
            found, fix = "data.keep leaves out every row", "let more of them pass"
        problems.append(Problem(path, None, "empty", found, fix))
    problems.extend(_mixed_forms(path, rows))
    problems.extend(_mixed_orders(path, rows))
    problems.sort(key=lambda problem: problem.line or 0)
    return FileRows(path, tuple(rows), tuple(problems), gone)


def _read_row(line: int, value: Any, keys: RowKeys) -> tuple[list[Complaint], Row | None]:
    if not isinstance(value, dict):
        found = f"not a JSON object but {shown(value)}"
        return [Complaint("not an object", found, f"write an object with {FORMS}")], None
    weight, order, complaints = weight_and_order(value, keys)
    value = renamed(value, keys)
    forms = _conversation_forms(value)
    if len(forms) > 1:
        found = f"has both {forms[0]} and {forms[1]}"
        return [Complaint("several forms", found, "keep one of them")], None
    form: Form | None = forms[0] if forms else "text" if "text" in value else None
    if form is None:
        there = ", ".join(shown(key) for key in list(value)[:6]) or "no keys"
        found = f"not a known form of row ({there})"
        return [Complaint("unknown form", found, f"write {FORMS}")], None
    if form == "conversations":
        value = {**value, "messages": conversation_messages(value["conversations"])}
    complaints += _form_complaints(form, value) + tools_complaints(value.get("tools"))
    category = value.get("category")
    if not isinstance(category, str | int | float | None):
        found = f"category is {shown(category)}"
        complaints.append(Complaint("category not text", found, "write one name"))
    complaints.extend(text_complaints(category, "category"))
    if form == "text" and value.get("tools"):
        fix = "remove them, or write the row as messages"
        complaints.append(Complaint("tools in plain text", "plain text cannot have tools", fix))
    if complaints:
        return complaints, None
    return [], Row(
        line=line,
        form=form,
        messages=None if form == "text" else _messages(form, value),
        text=value["text"] if form == "text" else None,
        tools=tuple(value["tools"]) if value.get("tools") else None,
        category=None if category is None else str(category),
        weight=weight,
        order=order,
    )


def _conversation_forms(value: Mapping[str, Any]) -> list[Form]:
    forms: list[Form] = []
    if "messages" in value:
        forms.append("messages")
    if "conversations" in value:
        forms.append("conversations")
    if "prompt" in value and "completion" in value:
        forms.append("prompt/completion")
    if "instruction" in value and "output" in value:
        forms.append("instruction/output")
    return forms


def _form_complaints(form: Form, value: Mapping[str, Any]) -> list[Complaint]:
    if form in ("messages", "conversations"):
        return message_complaints(value["messages"], form)
    question, answer = {
        "prompt/completion": ("prompt", "completion"),
        "instruction/output": ("instruction", "output"),
        "text": ("text", "text"),
    }[form]
    keys = {question: None, answer: None}
    if form == "instruction/output" and value.get("input") is not None:
        keys["input"] = None
    complaints = []
    for key in keys:
        if not isinstance(value[key], str):
            found = f"{key} is not text but {shown(value[key])}"
            complaints.append(Complaint(f"{key} not text", found, "write it as one text"))
        else:
            complaints.extend(text_complaints(value[key], key))
    if isinstance(value[answer], str) and not value[answer].strip():
        found = f"{answer} is empty"
        complaints.append(Complaint(f"empty {answer}", found, "write it, or remove the row"))
    return complaints


def _messages(form: Form, value: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    if form in ("messages", "conversations"):
        return normal_messages(value["messages"])
    if form == "prompt/completion":
        question, answer = value["prompt"], value["completion"]
    else:
        parts = (value["instruction"], value.get("input") or "")
        question = "\n\n".join(part for part in parts if part.strip())
        answer = value["output"]
    return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})


def _mixed_forms(path: Path, rows: list[Row]) -> list[Problem]:
    forms = Counter(row.form for row in rows)
    if len(forms) < 2:
        return []
    usual = forms.most_common(1)[0][0]
    fix = "write all rows of a file in one form"
    return [
        Problem(path, row.line, "another form", f"{row.form} among rows of {usual}", fix)
        for row in rows
        if row.form != usual
    ]


def _mixed_orders(path: Path, rows: list[Row]) -> list[Problem]:
    """Return rows whose order is a text among numbers, which cannot be compared."""
    texts = [row for row in rows if isinstance(row.order, str)]
    if not 0 < len(texts) < sum(row.order is not None for row in rows):
        return []
    found, fix = "is ordered by a text where others are by a number", "write all in one way"
    return [Problem(path, row.line, "another order", found, fix) for row in texts]
