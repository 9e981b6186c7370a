"""What a recipe says of rows' keys: names, filters, order, and rules whose rows are left out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.data.field_mapping import RowKeys
from mlx_ft.data.order import spread, training_order
from mlx_ft.data.prepare import prepare_data
from mlx_ft.data.rows import read_rows
from mlx_ft.data.sources import read_splits
from mlx_ft.data.tokens import read_split
from mlx_ft.errors import DataError
from mlx_ft.model.chat import ChatRenderer
from mlx_ft.recipe.schema import DataRecipe, RowFilter
from tests.data.conftest import WriteFile
from tests.support.chats import chat, sentence
from tests.support.narration import HeardConsole, SeenProgress

WORDS = ("hello there friend", "what a day", "a long road home", "never mind the rain")


def lines_of(file: Any) -> list[int]:
    return [row.line for row in file.rows]


def test_parts_under_other_names_are_the_same_rows(write_file: WriteFile, tmp_path: Path) -> None:
    plain = [{"prompt": f"{word}?", "completion": word} for word in WORDS]
    named = [{"question": r["prompt"], "answer": r["completion"], "prompt": "id-7"} for r in plain]
    one = read_rows(write_file(plain))
    other = read_rows(
        write_file(named, "named.jsonl"),
        RowKeys(parts={"prompt": "question", "completion": "answer"}),
    )
    assert other.problems == () and one.rows == other.rows


def test_a_part_that_is_not_there_is_a_problem_with_its_line(write_file: WriteFile) -> None:
    rows = [{"q": "a", "completion": "b"}, {"completion": "b"}]
    (problem,) = read_rows(write_file(rows), RowKeys(parts={"prompt": "q"})).problems
    assert problem.line == 2


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({"at_least": 3}, [2, 3]),
        ({"at_most": 3}, [1, 2]),
        ({"at_least": 2, "at_most": 3.5}, [2]),
    ],
)
def test_rows_are_kept_by_a_number(
    write_file: WriteFile, rule: dict[str, Any], kept: list[int]
) -> None:
    """Also where it is written as a text, as in CSV; what is left out need not be a good row."""
    rows = [chat(quality=1), chat(quality="3"), chat(quality=4.5)]
    path = write_file(rows)
    read = read_rows(path, RowKeys(keep=(RowFilter(field="quality", **rule),)))
    assert lines_of(read) == kept and read.problems == ()
    left = [line for gone in read.left_out for line in gone.lines]
    assert sorted(left + kept) == [1, 2, 3]
    assert all("quality" in gone.why for gone in read.left_out)


def test_rows_are_kept_by_a_text_and_by_all_filters_together(write_file: WriteFile) -> None:
    rows = [chat(lang="en", q=1), chat(lang="en", q=5), chat(lang="de", q=5), {"lang": "de"}]
    keep = (RowFilter(field="lang", one_of=["en"]), RowFilter(field="q", at_least=2))
    assert lines_of(read_rows(write_file(rows), RowKeys(keep=keep))) == [2]


def test_a_row_without_what_it_is_chosen_by_is_a_problem(write_file: WriteFile) -> None:
    rows = [chat(q=1), chat(), chat(q="good"), chat(q=True)]
    problems = read_rows(
        write_file(rows), RowKeys(keep=(RowFilter(field="q", at_least=0),))
    ).problems
    assert [(p.line, p.found) for p in problems] == [
        (2, "has no q"),
        (3, "q is 'good', not a number"),
        (4, "q is True, not a number"),
    ]


def test_filters_that_leave_nothing_say_so(write_file: WriteFile) -> None:
    keep = (RowFilter(field="q", at_least=2),)
    (problem,) = read_rows(write_file([chat(q=1)]), RowKeys(keep=keep)).problems
    assert "data.keep" in problem.found


def with_copies(write_file: WriteFile, tmp_path: Path) -> None:
    rows = [chat(f"{word}?", f"answer to {word}") for word in WORDS]
    write_file([*rows, rows[0], chat("tell me more", "it began with ...")])
    write_file([chat("another one?", "this is it"), chat("cut?", "it goes on…")], "valid.jsonl")


def test_rows_that_a_rule_hits_are_dropped_in_both_splits(
    write_file: WriteFile, tmp_path: Path
) -> None:
    with_copies(write_file, tmp_path)
    plain = read_splits(DataRecipe(path=str(tmp_path)))
    assert [len(plain[split].rows) for split in ("train", "valid")] == [6, 2]
    data = DataRecipe(path=str(tmp_path), drop=["duplicates", "cut-answers"])
    read = read_splits(data)
    assert lines_of(read["train"]) == [1, 2, 3, 4] and lines_of(read["valid"]) == [1]
    gone = {each.why: each.lines for each in read["train"].left_out}
    assert gone == {"hit by duplicates": (5,), "hit by cut-answers": (6,)}


def test_what_is_left_out_is_said_and_counted(
    write_file: WriteFile, tmp_path: Path, renderer: ChatRenderer
) -> None:
    with_copies(write_file, tmp_path)
    console = HeardConsole()
    (tmp_path / "out").mkdir()
    data = DataRecipe(path=str(tmp_path), drop=["duplicates"])
    prepare_data(data, renderer, tmp_path / "out", console, SeenProgress())
    assert any("left out 1 rows hit by duplicates (line 5)" in line for line in console.lines)
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    (gone,) = stats["splits"]["train"]["left_out"]
    assert gone == {"why": "hit by duplicates", "count": 1, "lines": [5]}
    assert not any(hit["rule"] == "duplicates" for hit in stats["lint"])


def test_dropping_everything_is_an_error(write_file: WriteFile, tmp_path: Path) -> None:
    write_file([chat("a?", "cut ...")])
    write_file([chat()], "valid.jsonl")
    read = read_splits(DataRecipe(path=str(tmp_path), drop=["cut-answers"]))
    assert "data.drop" in read["train"].problems[0].found


def trained_lines(data: DataRecipe, renderer: ChatRenderer, out: Path) -> list[int]:
    out.mkdir(exist_ok=True)
    prepare_data(data, renderer, out, HeardConsole(), SeenProgress())
    return [int(line) for line in read_split(out / "train.safetensors").lines]


@pytest.fixture
def difficult(write_file: WriteFile, tmp_path: Path) -> Path:
    """Rows whose difficulty and length do not agree."""
    rows = [
        chat(sentence(number, 3), sentence(number, words), difficulty=difficulty)
        for number, (words, difficulty) in enumerate([(9, 2), (2, "1"), (30, 1.5), (5, 3)])
    ]
    write_file(rows)
    write_file([chat("another one?", "this is it", difficulty=0)], "valid.jsonl")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"order": "file"}, [1, 2, 3, 4]),
        ({"order": "length"}, [2, 4, 1, 3]),
        ({"order_field": "difficulty"}, [2, 3, 1, 4]),
    ],
)
def test_rows_are_written_in_the_order_that_is_wanted(
    difficult: Path, renderer: ChatRenderer, changes: dict[str, Any], lines: list[int]
) -> None:
    data = DataRecipe(path=str(difficult), **changes)
    assert trained_lines(data, renderer, difficult / "out") == lines
    plain = trained_lines(DataRecipe(path=str(difficult)), renderer, difficult / "plain")
    one, other = (read_split(difficult / f / "train.safetensors") for f in ("out", "plain"))
    for index, line in enumerate(lines):
        place = plain.index(line)
        ordered, given_ = one.row(index), other.row(place)
        assert all(np.array_equal(ordered[part], given_[part]) for part in (0, 1))


def test_an_order_that_rows_do_not_have_is_a_problem(difficult: Path) -> None:
    with (difficult / "train.jsonl").open("a") as stream:
        stream.write(json.dumps(chat("b", "c")) + "\n" + json.dumps(chat(difficulty="high")) + "\n")
    data = DataRecipe(path=str(difficult), order_field="difficulty")
    problems = read_splits(data)["train"].problems
    assert [(p.line, p.found) for p in problems] == [
        (5, "has no difficulty to be ordered by"),
        (6, "is ordered by a text where others are by a number"),
    ]


@given(st.integers(0, 30), st.integers(0, 30))
def test_spread_keeps_both_orders_and_mixes_them_evenly(own: int, others: int) -> None:
    mine, theirs = list(range(own)), list(range(100, 100 + others))
    mixed = spread(mine, theirs)
    assert [i for i in mixed if i < 100] == mine and [i for i in mixed if i >= 100] == theirs
    for count in range(1, len(mixed) + 1):
        share = others / (own + others)
        assert abs(sum(i >= 100 for i in mixed[:count]) - share * count) <= 1


def test_rows_of_no_file_are_spread_over_the_others(renderer: ChatRenderer) -> None:
    from dataclasses import replace

    from tests.support.chats import good

    rows = good(6)
    replayed = [replace(row, line=-number) for number, row in enumerate(rows[:2], 1)]
    order = training_order([*rows, *replayed], [5] * 8, DataRecipe(path=".", order="file"))
    assert order == [0, 1, 6, 2, 3, 4, 7, 5] or order == [0, 6, 1, 2, 3, 4, 7, 5]


def test_conflicts_are_said() -> None:
    with pytest.raises(ValueError, match="order and order_field"):
        DataRecipe(path="x", order="file", order_field="a")
    with pytest.raises(ValueError, match="lets all pass"):
        RowFilter(field="a")
    with pytest.raises(ValueError, match="no rows to validate on"):
        DataRecipe(path="hf:a/b")


def test_a_missing_package_or_dataset_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="cannot be fetched"):
        read_splits(DataRecipe(path="hf:nobody/nothing-at-all", holdout=0.1))
