"""A file of JSON lines to typed rows, every line checked before anything else happens.

Does: read `train.jsonl` and `valid.jsonl` line by line, recognise each row's form, collect all that
is wrong with its line number. Does not: render, tokenize, repair, or fetch anything.

The forms: `messages` (with `tools`), `prompt` and `completion`, `instruction`, `input` and
`output`, and plain `text`. Of the other keys only `category` is read, and the one that a recipe
names as a row's weight. Blank lines are ignored.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from mlx_ft.data.messages import (
    Complaint,
    message_complaints,
    normal_messages,
    text_complaints,
    tools_complaints,
)
from mlx_ft.data.problems import Problem, shown

Form = Literal["messages", "prompt/completion", "instruction/output", "text"]
MAX_LINE_BYTES = 16 * 1024 * 1024
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
FORMS = "messages, prompt and completion, instruction and output, or text"


@dataclass(frozen=True)
class Row:
    """One training row: `messages` to be rendered, or plain `text`, never both.

    `line` is 1-based. `form` is how the file had it; prompt/completion and instruction/output are
    already messages here.
    """

    line: int
    form: Form
    messages: tuple[Mapping[str, Any], ...] | None
    text: str | None
    tools: tuple[Mapping[str, Any], ...] | None
    category: str | None
    weight: float = 1.0


@dataclass(frozen=True)
class FileRows:
    """The good rows of a file in their order, and everything that is wrong with the others."""

    path: Path
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]


def read_rows(path: Path, weight_field: str | None = None) -> FileRows:
    """Read a file of JSON lines; whatever is in it, this raises nothing and lists problems.

    `weight_field` is the key of a row's weight in the loss; a row without it weighs 1.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    try:
        with path.open("rb") as stream:
            for line, raw in _lines(stream):
                complaints, row = _read_line(line, raw, weight_field)
                problems.extend(Problem(path, line, c.kind, c.found, c.fix) for c in complaints)
                if row is not None:
                    rows.append(row)
    except OSError as error:
        found = f"cannot be read ({error.strerror or error})"
        problems.append(Problem(path, None, "cannot be read", found, "check the file"))
        return FileRows(path, (), tuple(problems))
    if not rows and not problems:
        fix = "write one JSON object a line"
        problems.append(Problem(path, None, "empty", "there are no rows in it", fix))
    problems.extend(_mixed_forms(path, rows))
    problems.sort(key=lambda problem: problem.line or 0)
    return FileRows(path, tuple(rows), tuple(problems))


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number, line) of all lines that are not blank; None for one that is far too long."""
    line = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        line += 1
        if len(raw) > MAX_LINE_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(MAX_LINE_BYTES)
            yield line, None
        elif raw.strip():
            yield line, raw


def _read_line(
    line: int, raw: bytes | None, weight_field: str | None
) -> tuple[list[Complaint], Row | None]:
    fix = "fix or remove the line"
    if raw is None:
        found = f"longer than {MAX_LINE_BYTES // 2**20} MiB"
        return [Complaint("line too long", found, fix)], None
    if line == 1 and raw.startswith(BYTE_ORDER_MARK):
        found = "starts with a byte order mark"
        return [Complaint("byte order mark", found, "save the file as UTF-8 without BOM")], None
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        found = f"not UTF-8 (byte {raw[error.start]:#04x} at column {error.start + 1})"
        return [Complaint("not UTF-8", found, "save the file as UTF-8")], None
    except json.JSONDecodeError as error:
        found = f"not valid JSON ({error.msg}, column {error.colno})"
        return [Complaint("not valid JSON", found, fix)], None
    except ValueError as error:  # NaN, or a number of thousands of digits
        return [Complaint("not valid JSON", f"not valid JSON ({error})", fix)], None
    except RecursionError:
        return [Complaint("not valid JSON", "not valid JSON (nested too deeply)", fix)], None
    if not isinstance(value, dict):
        found = f"not a JSON object but {shown(value)}"
        return [Complaint("not an object", found, f"write an object with {FORMS}")], None
    return _read_row(line, value, weight_field)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _read_row(
    line: int, value: Mapping[str, Any], weight_field: str | None
) -> tuple[list[Complaint], Row | None]:
    forms = _conversation_forms(value)
    if len(forms) > 1:
        found = f"has both {forms[0]} and {forms[1]}"
        return [Complaint("several forms", found, "keep one of them")], None
    form: Form | None = forms[0] if forms else "text" if "text" in value else None
    if form is None:
        keys = ", ".join(shown(key) for key in list(value)[:6]) or "no keys"
        found = f"not a known form of row ({keys})"
        return [Complaint("unknown form", found, f"write {FORMS}")], None
    complaints = _form_complaints(form, value) + tools_complaints(value.get("tools"))
    category = value.get("category")
    if not isinstance(category, str | int | float | None):
        found = f"category is {shown(category)}"
        complaints.append(Complaint("category not text", found, "write one name"))
    complaints.extend(text_complaints(category, "category"))
    if form == "text" and value.get("tools"):
        fix = "remove them, or write the row as messages"
        complaints.append(Complaint("tools in plain text", "plain text cannot have tools", fix))
    weight = 1 if weight_field is None else value.get(weight_field, 1)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < 1e6:
        found = f"{weight_field} is {shown(weight)}, not a weight"
        complaints.append(Complaint("weight not a number", found, "write a number from 0 on"))
    if complaints:
        return complaints, None
    return [], Row(
        line=line,
        form=form,
        messages=None if form == "text" else _messages(form, value),
        text=value["text"] if form == "text" else None,
        tools=tuple(value["tools"]) if value.get("tools") else None,
        category=None if category is None else str(category),
        weight=float(weight),
    )


def _conversation_forms(value: Mapping[str, Any]) -> list[Form]:
    forms: list[Form] = []
    if "messages" in value:
        forms.append("messages")
    if "prompt" in value and "completion" in value:
        forms.append("prompt/completion")
    if "instruction" in value and "output" in value:
        forms.append("instruction/output")
    return forms


def _form_complaints(form: Form, value: Mapping[str, Any]) -> list[Complaint]:
    if form == "messages":
        return message_complaints(value["messages"])
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
    if form == "messages":
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
