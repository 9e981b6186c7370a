"""Every line of a data file becomes a row or a problem with its line number; nothing raises."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_ft.data.files import MAX_LINE_BYTES
from mlx_ft.data.problems import LISTED_FAULTS, raise_problems
from mlx_ft.data.rows import read_rows
from mlx_ft.errors import DataError
from tests.data.conftest import WriteFile
from tests.support.chats import CALL, GOOD_ROWS, TOOL_ROW, chat, hostile_lines, nested

SHARED_FOLDER = settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def problems_of(path: Path) -> list[tuple[int | None, str]]:
    return [(problem.line, problem.found) for problem in read_rows(path).problems]


@pytest.mark.parametrize("row", GOOD_ROWS, ids=lambda row: "+".join(row))
def test_every_form_is_read(row: dict[str, Any], write_file: WriteFile) -> None:
    read = read_rows(write_file([row]))
    assert read.problems == () and len(read.rows) == 1
    (only,) = read.rows
    assert (only.text is None) != (only.messages is None)
    if only.messages is not None:
        assert only.messages[-1]["role"] == "assistant"


def test_prompt_and_instruction_forms_become_the_same_conversation(write_file: WriteFile) -> None:
    forms = [
        chat("add\n\n2 and 2", "4"),
        {"prompt": "add\n\n2 and 2", "completion": "4"},
        {"instruction": "add", "input": "2 and 2", "output": "4"},
        {"instruction": "add\n\n2 and 2", "input": "", "output": "4"},
    ]
    read = [read_rows(write_file([row])).rows[0].messages for row in forms]
    assert read == [read[0]] * len(forms)


def test_tool_arguments_as_text_and_as_an_object_are_the_same_row(write_file: WriteFile) -> None:
    as_text = json.loads(json.dumps(TOOL_ROW))
    function = as_text["messages"][2]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    first, second = read_rows(write_file([TOOL_ROW, as_text])).rows
    assert first.messages == second.messages and first.tools == second.tools
    assert first.messages is not None
    assert first.messages[2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_lines_are_counted_as_an_editor_counts_them(write_file: WriteFile) -> None:
    separator = json.dumps(chat("a\u2028b"), ensure_ascii=False).encode()
    raw = [b"", json.dumps(chat()).encode() + b"\r", b"  ", separator, b"", b"{"]
    read = read_rows(write_file(raw))
    assert [row.line for row in read.rows] == [2, 4]
    assert [problem.line for problem in read.problems] == [6]


def test_a_broken_line_118_is_named_and_the_fix_is_said(write_file: WriteFile) -> None:
    rows: list[Any] = [chat(f"question {i}") for i in range(150)]
    rows[117] = b'{"messages": [{"role": "user"'
    path = write_file(rows)
    with pytest.raises(DataError) as error:
        raise_problems(read_rows(path).problems)
    (fault,) = error.value.faults
    assert str(fault).startswith(f"{path}:118: not valid JSON (")
    assert str(fault).endswith(" - fix or remove the line")


def test_many_faults_are_listed_up_to_twenty_with_totals_by_kind(write_file: WriteFile) -> None:
    broken = [b"{"] * 30 + [chat(answer=" ")] * 12 + [chat()]
    with pytest.raises(DataError) as error:
        raise_problems(read_rows(write_file(broken)).problems)
    faults = error.value.faults
    assert len(faults) == LISTED_FAULTS + 1
    assert "42 faults in all (30 not valid JSON, 12 empty answer)" in faults[-1].found


def test_a_file_of_two_forms_names_the_rows_of_the_rarer_one(write_file: WriteFile) -> None:
    path = write_file([{"prompt": "a", "completion": "b"}, chat(), chat(), {"text": "x"}])
    assert problems_of(path) == [
        (1, "prompt/completion among rows of messages"),
        (4, "text among rows of messages"),
    ]


def test_extra_keys_are_allowed_and_the_category_is_kept(write_file: WriteFile) -> None:
    read = read_rows(write_file([chat(category="talk", source={"a": 1}), chat(category=3), chat()]))
    assert read.problems == ()
    assert [row.category for row in read.rows] == ["talk", "3", None]


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_a_file_without_rows_is_a_problem(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    assert problems_of(path) == [(None, "there are no rows in it")]


def test_what_cannot_be_opened_is_a_problem(tmp_path: Path) -> None:
    assert "Is a directory" in problems_of(tmp_path)[0][1]
    assert "No such file" in problems_of(tmp_path / "none.jsonl")[0][1]


def test_a_line_far_too_long_is_skipped_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"x" * (2 * MAX_LINE_BYTES + 7) + b"\n" + json.dumps(chat()).encode())
    read = read_rows(path)
    assert [problem.found for problem in read.problems] == ["longer than 16 MiB"]
    assert [row.line for row in read.rows] == [2]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"\xff\xfe{", "not UTF-8 (byte 0xff at column 1)"),
        (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9 at column 14)"),
        (b"\xef\xbb\xbf{}", "starts with a byte order mark"),
        (b'{"text": NaN}', "not valid JSON (NaN is not JSON)"),
        (b'{"text": "a\x00b"}', "not valid JSON (Invalid control character at, column 12)"),
        (b'{"text": "a\\u0000b"}', "text contains a NUL character (character 2)"),
        (b'{"text": "\\ud83d"}', "text contains half of a surrogate pair (character 1)"),
        (b'{"text": 12}', "text is not text but 12"),
        (b'{"text": " "}', "text is empty"),
        (b"[1, 2]", "not a JSON object but a list"),
        (b"{}", "not a known form of row (no keys)"),
        (b'{"question": 1}', "not a known form of row ('question')"),
        (b'{"prompt": ["a"], "completion": "b"}', "prompt is not text but a list"),
        (b'{"prompt": "a", "completion": ""}', "completion is empty"),
        (b'{"instruction": "a", "input": 5, "output": "b"}', "input is not text but 5"),
        (b'{"text": "a", "category": []}', "category is a list"),
        (b'{"text": "a", "tools": [{}]}', "plain text cannot have tools"),
        (nested(100_000, "list"), "not valid JSON (nested too deeply)"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_line_is_named(line: bytes, found: str, write_file: WriteFile) -> None:
    ((number, said),) = problems_of(write_file([line]))
    assert number == 1
    assert said.startswith(found)


def test_two_conversations_in_one_row_are_not_chosen_between(write_file: WriteFile) -> None:
    row = {**chat(), "prompt": "a", "completion": "b"}
    assert problems_of(write_file([row])) == [(1, "has both messages and prompt/completion")]


@SHARED_FOLDER
@given(lines=st.lists(hostile_lines, max_size=4))
def test_no_file_content_raises(lines: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "hostile.jsonl"
    path.write_bytes(b"\n".join(lines))
    read = read_rows(path)
    assert read.rows or read.problems
    count = path.read_bytes().count(b"\n") + 1
    assert all(problem.line is None or 1 <= problem.line <= count for problem in read.problems)
    for problem in read.problems:
        str(problem.fault()).encode()  # what is said can be printed
