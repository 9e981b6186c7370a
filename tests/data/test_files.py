"""The same rows in any kind of file are the same rows; a broken file is a message with a place."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from mlx_ft.data.field_mapping import RowKeys
from mlx_ft.data.files import READERS, read_items
from mlx_ft.data.messages import OTHER_NAMES, message_complaints
from mlx_ft.data.render import render_split
from mlx_ft.data.rows import read_rows
from mlx_ft.data.sources import source_files
from mlx_ft.errors import DataError
from mlx_ft.model.chat import ChatRenderer
from mlx_ft.recipe.schema import DataRecipe
from tests.support.chats import GOOD_ROWS, TOOL_ROW, chat

PAIRS = [
    {"prompt": "what is it?", "completion": 'a "fox",\nquick', "category": "talk"},
    {"prompt": "2 + 2?", "completion": "4", "category": "sums"},
    {"prompt": "ümläut, please", "completion": "ä; ö", "category": "talk"},
]
Rows = list[dict[str, Any]]


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")


def write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Rows) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
    ".parquet": write_parquet,
}


def test_every_kind_is_written_here() -> None:
    assert set(WRITERS) == set(READERS)


@pytest.mark.parametrize("ending", READERS)
def test_pairs_are_the_same_rows_in_every_kind_of_file(tmp_path: Path, ending: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", PAIRS)
    WRITERS[ending](tmp_path / f"train{ending}", PAIRS)
    wanted, read = (read_rows(tmp_path / name) for name in ("a.jsonl", f"train{ending}"))
    assert read.problems == () and len(read.rows) == len(PAIRS)
    assert [replace(row, line=0) for row in read.rows] == [
        replace(row, line=0) for row in wanted.rows
    ]


@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_conversations_with_tools_survive(tmp_path: Path, ending: str) -> None:
    """A table gives every row the fields of all; those that are null are not there."""
    schema = {"name": "lint", "parameters": {"type": "object"}}  # Parquet has no empty objects
    tools = [{"type": "function", "function": schema}]
    rows = [TOOL_ROW | {"tools": tools}, chat("hello", "fine")]
    WRITERS[ending](tmp_path / f"train{ending}", rows)
    read = read_rows(tmp_path / f"train{ending}")
    write_jsonl(tmp_path / "a.jsonl", rows)
    wanted = read_rows(tmp_path / "a.jsonl").rows
    assert read.problems == ()
    assert [(row.messages, row.tools) for row in read.rows] == [
        (row.messages, row.tools) for row in wanted
    ]


def test_a_csv_row_has_the_line_that_it_ends_in(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", PAIRS)
    assert [row.line for row in read_rows(tmp_path / "train.csv").rows] == [3, 4, 5]


@pytest.mark.parametrize(
    ("name", "content", "line", "found"),
    [
        ("a.json", b'{"text": "a"}', 1, "not a JSON list"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n', 1, "not a JSON list but JSON lines"),
        ("a.json", b'[{"text": "a"},', 1, "not valid JSON"),
        ("a.json", b'[{"text": "a"}, 3]', 2, "not a JSON object"),
        ("a.json", b'[{"text": NaN}]', 1, "not valid JSON"),
        ("a.json", b"\xff[]", 1, "not UTF-8"),
        ("a.json", b"[]", None, "there are no rows"),
        ("a.csv", b"prompt,completion\na,b,c\nd,e\n", 2, "3 cells where the header has 2"),
        ("a.csv", b'prompt,completion\n"a,b\n', 2, "not valid CSV"),
        ("a.csv", b"prompt,prompt\na,b\n", 1, "is there twice"),
        ("a.csv", b"prompt,completion\na,\n", 2, "not a known form"),
        ("a.csv", b"\xff\xfe", 1, "not UTF-8"),
        ("a.csv", b"prompt,completion\n", None, "there are no rows"),
        ("a.parquet", b"PAR1 not really", 1, "not valid Parquet"),
        ("a.parquet", b"", 1, "not valid Parquet"),
    ],
)
def test_a_broken_file_is_told_with_its_place(
    tmp_path: Path, name: str, content: bytes, line: int | None, found: str
) -> None:
    (tmp_path / name).write_bytes(content)
    problems = read_rows(tmp_path / name).problems
    assert any(p.line == line and found in p.found for p in problems), problems


@given(st.sampled_from(sorted(READERS)), st.binary(max_size=300))
def test_any_bytes_are_rows_or_problems(
    tmp_path_factory: pytest.TempPathFactory, ending: str, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"train{ending}"
    path.write_bytes(content)
    read = read_rows(path)
    assert read.rows or read.problems
    assert all(place >= 1 for place, _, _ in read_items(path))


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    rows = [{"prompt": "count", "completion": "1 " * 100_000}]
    write_csv(tmp_path / "train.csv", rows)
    read = read_rows(tmp_path / "train.csv")
    assert read.problems == () and len(read.rows) == 1


@pytest.mark.parametrize("ending", READERS)
def test_the_weight_of_a_row_may_be_text(tmp_path: Path, ending: str) -> None:
    rows = [pair | {"quality": text} for pair, text in zip(PAIRS, ("2", "0.5", "1e1"), strict=True)]
    WRITERS[ending](tmp_path / f"train{ending}", rows)
    read = read_rows(tmp_path / f"train{ending}", RowKeys(weight="quality"))
    assert read.problems == () and [row.weight for row in read.rows] == [2, 0.5, 10]
    WRITERS[ending](tmp_path / f"train{ending}", [PAIRS[0] | {"quality": "high"}])
    (problem,) = read_rows(tmp_path / f"train{ending}", RowKeys(weight="quality")).problems
    assert problem.found == "quality is 'high', not a weight"


def test_an_error_without_a_word_is_told_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise pa.ArrowException

    write_parquet(tmp_path / "train.parquet", PAIRS)
    monkeypatch.setattr(parquet, "ParquetFile", refuse)
    (problem,) = read_rows(tmp_path / "train.parquet").problems
    assert problem.found == "not valid Parquet (ArrowException)"


def test_parquet_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "train.parquet", PAIRS)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (problem,) = read_rows(tmp_path / "train.parquet").problems
    assert "pyarrow" in problem.found and "pip install" in problem.fix


def test_either_kind_of_file_may_be_in_the_folder_but_one_a_split(tmp_path: Path) -> None:
    recipe = DataRecipe(path=str(tmp_path))
    write_csv(tmp_path / "train.csv", PAIRS)
    with pytest.raises(DataError, match=r"valid\.jsonl"):
        source_files(recipe)
    write_jsonl(tmp_path / "valid.jsonl", PAIRS)
    assert {k: v.name for k, v in source_files(recipe).items()} == {
        "train": "train.csv",
        "valid": "valid.jsonl",
    }
    write_json(tmp_path / "train.json", PAIRS)
    with pytest.raises(DataError, match=r"train\.csv is there as well"):
        source_files(recipe)


SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "lint it"},
        {"from": "function_call", "value": '{"name": "lint", "arguments": {"path": "a.py"}}'},
        {"from": "observation", "value": "ok"},
        {"from": "gpt", "value": "all is well"},
    ]
}


def test_sharegpt_conversations_are_messages(tmp_path: Path, renderer: ChatRenderer) -> None:
    write_jsonl(tmp_path / "train.jsonl", [SHAREGPT])
    read = read_rows(tmp_path / "train.jsonl")
    assert read.problems == ()
    (row,) = read.rows
    assert row.messages is not None and row.form == "conversations"
    roles = [message["role"] for message in row.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[2]["tool_calls"][0]["function"]["arguments"] == {"path": "a.py"}
    split = render_split(
        tmp_path / "train.jsonl", read.rows, renderer, DataRecipe(path=str(tmp_path))
    )
    assert split.problems == () and len(split.tokens) == 1


ASKED = {"from": "human", "value": "lint it"}
LINT = {"name": "lint", "arguments": {"path": "a.py"}}


@pytest.mark.parametrize(
    "value",
    [json.dumps([LINT, LINT]), [LINT, LINT], json.dumps([{"function": LINT}, LINT])],
)
@pytest.mark.parametrize("speaker", ["function_call", "Function_Call"])
def test_every_call_of_a_sharegpt_turn_is_a_call(tmp_path: Path, speaker: str, value: Any) -> None:
    write_jsonl(
        tmp_path / "train.jsonl", [{"conversations": [ASKED, {"from": speaker, "value": value}]}]
    )
    read = read_rows(tmp_path / "train.jsonl")
    assert read.problems == () and read.rows[0].messages is not None
    calls = read.rows[0].messages[1]["tool_calls"]
    assert [call["function"] for call in calls] == [LINT, LINT]


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_every_other_name_of_a_role_is_read_and_explained(tmp_path: Path, name: str) -> None:
    turns = [ASKED, {"from": "gpt", "value": "hi"}, {"from": name.upper(), "value": "[]"}]
    write_jsonl(tmp_path / "train.jsonl", [{"conversations": [*turns, turns[1]]}])
    assert not any("role" in each.found for each in read_rows(tmp_path / "train.jsonl").problems)
    (complaint,) = message_complaints([{"role": name, "content": "hi"}])
    assert complaint.fix == f'write "{OTHER_NAMES[name]}"'


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ("hello", "conversations is text"),
        ([], "conversations is empty"),
        ([{"from": "narrator", "value": "once"}], "message 1 has role 'narrator'"),
        ([{"from": "human"}], "message 1"),
        ([{"value": "hi"}], "message 1 has no role"),
        ([{"from": ["human"], "value": "hi"}], "message 1 has role a list"),
        ([{"from": "human", "value": "hi"}], "no answer to learn"),
        ([ASKED, {"from": "gpt", "value": "hi", "weight": 0}], "message 2 has weight 0"),
        ([ASKED, {"from": "gpt", "value": "hi", "name": 3}], "message 2 has name as a number"),
        ([ASKED, {"from": "function_call", "value": "lint()"}], "which is no JSON"),
        ([ASKED, {"from": "function_call", "value": "3"}], "which is no JSON call"),
        ([ASKED, {"from": "function_call", "value": '["lint"]'}], "tool call 1, names no function"),
        ([ASKED, {"from": "function_call", "value": "[]"}], "message 2 is an empty answer"),
        ([ASKED, {"from": "function_call"}], "message 2 is an empty answer"),
    ],
)
def test_a_broken_conversation_is_told(tmp_path: Path, turns: Any, found: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"conversations": turns}])
    problems = read_rows(tmp_path / "train.jsonl").problems
    assert any(found in problem.found for problem in problems), problems


def test_the_forms_of_the_other_tests_are_read_from_json_as_well(tmp_path: Path) -> None:
    for number, row in enumerate(GOOD_ROWS):
        path = tmp_path / f"{number}.json"
        write_json(path, [row])
        assert read_rows(path).problems == ()
