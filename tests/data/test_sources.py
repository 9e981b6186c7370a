"""Rows that are held out are never trained, whatever happens around them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.data.prepare import prepare_data
from mlx_ft.data.rows import Row
from mlx_ft.data.sources import data_inputs, hold_out, read_splits
from mlx_ft.errors import DataError
from mlx_ft.model.chat import ChatRenderer
from mlx_ft.recipe.schema import DataRecipe
from tests.data.conftest import WriteFile
from tests.support.chats import chat, good, row, sentence
from tests.support.narration import HeardConsole, SeenProgress


def lines(rows: list[Row]) -> list[int]:
    return [row.line for row in rows]


@given(st.integers(0, 99), st.floats(0.02, 0.9), st.integers(2, 80))
def test_every_row_is_on_one_side_in_order(seed: int, share: float, count: int) -> None:
    rows = good(count)
    rest, held = hold_out(rows, share, seed)
    assert sorted(lines(rest) + lines(held)) == lines(rows)
    assert lines(rest) == sorted(lines(rest)) and lines(held) == sorted(lines(held))


def test_the_share_is_what_was_asked_for() -> None:
    rest, held = hold_out(good(2000), 0.1, 0)
    assert 140 < len(held) < 260, "200, and 3 standard deviations of 13.4 with room"
    assert len(rest) + len(held) == 2000


def test_a_file_that_grows_keeps_its_sides() -> None:
    _, before = hold_out(good(200), 0.2, 0)
    _, after = hold_out(good(400), 0.2, 0)
    assert lines(before) == [line for line in lines(after) if line <= 200]


def test_another_seed_holds_out_other_rows() -> None:
    assert lines(hold_out(good(200), 0.2, 0)[1]) != lines(hold_out(good(200), 0.2, 1)[1])


def test_rows_that_are_equal_or_nearly_so_stay_together() -> None:
    rows = []
    for number in range(60):
        text = sentence(number, 50)
        for copy, ending in enumerate(("", " boat", " moon")):
            rows.append(row(3 * number + copy + 1, text + ending, "the same answer"))
    rest, held = hold_out(rows, 0.5, 0)
    families = [{(line - 1) // 3 for line in lines(side)} for side in (rest, held)]
    assert families[0] and families[1] and not families[0] & families[1]


def test_a_long_system_prompt_that_all_rows_share_makes_no_family() -> None:
    system = {"role": "system", "content": sentence(99, 400)}
    rows = [replace(one, messages=(system, *(one.messages or ()))) for one in good(400)]
    rest, held = hold_out(rows, 0.25, 0)
    assert 60 < len(held) < 140 and len(rest) + len(held) == 400
    assert lines(held) == lines(hold_out(good(400), 0.25, 0)[1])


def test_what_is_not_said_parts_no_equal_rows() -> None:
    """Ids of messages and of calls, and names, are other in every row of a log."""

    def logged(line: int, question: str) -> Row:
        call = {"id": f"call_{line}", "function": {"name": "f", "arguments": {"x": question}}}
        asked = {"role": "user", "content": question, "id": f"m{line}", "name": f"user{line}"}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        return Row(line, "messages", (asked, answer), None, None, None)

    rows = [logged(2 * n + copy + 1, f"q {n}") for n in range(60) for copy in (0, 1)]
    rest, held = hold_out(rows, 0.5, 0)
    families = [{(line - 1) // 2 for line in lines(side)} for side in (rest, held)]
    assert families[0] and families[1] and not families[0] & families[1]


def test_a_file_without_a_second_one_is_split(
    write_file: WriteFile, renderer: ChatRenderer, tmp_path: Path
) -> None:
    path = write_file([chat(sentence(n, 12), f"answer {n}") for n in range(100)])
    recipe = DataRecipe(path=str(tmp_path), holdout=0.2)
    read = read_splits(recipe)
    assert {file.path for file in read.values()} == {path}
    out = tmp_path / "out"
    out.mkdir()
    prepare_data(recipe, renderer, out, HeardConsole(), SeenProgress())
    stats = json.loads((out / "stats.json").read_text())
    assert stats["overlap_rows"] == 0
    counts = {split: stats["splits"][split]["rows"] for split in ("train", "valid")}
    assert sum(counts.values()) == 100 and counts["valid"] == len(read["valid"].rows) > 5
    assert data_inputs(recipe) == data_inputs(recipe.model_copy(update={"holdout_seed": 1}))


def test_what_only_the_system_message_tells_apart_is_on_either_side() -> None:
    """As where a text to classify stands there, and all answers are one of two words."""
    texts = [sentence(number, 60) for number in range(300)]
    rows = [
        replace(
            row(number + 1, "Classify.", "positive" if number % 2 else "negative"),
            messages=(
                {"role": "system", "content": texts[number % 300]},
                *(row(1, "Classify.", "positive" if number % 2 else "negative").messages or ()),
            ),
        )
        for number in range(600)
    ]
    rest, held = hold_out(rows, 0.2, 0)
    assert 60 < len(held) < 180
    apart = {line % 300 for line in lines(rest)} & {line % 300 for line in lines(held)}
    assert not apart, "the same text with the same answer is on one side"


def test_a_limit_takes_the_first_rows_of_each_side(write_file: WriteFile, tmp_path: Path) -> None:
    write_file([chat(sentence(number), sentence(-number)) for number in range(100)])
    recipe = DataRecipe(path=str(tmp_path), holdout=0.2)
    whole = read_splits(recipe)
    few = read_splits(recipe.model_copy(update={"limit": 3}))
    for split, file in few.items():
        assert file.rows == whole[split].rows[:3] and len(file.rows) == 3


def test_a_validation_file_beside_a_holdout_is_refused(
    write_file: WriteFile, tmp_path: Path
) -> None:
    write_file([chat()])
    write_file([chat()], "valid.jsonl")
    with pytest.raises(DataError, match=r"valid\.jsonl: is there beside data\.holdout"):
        read_splits(DataRecipe(path=str(tmp_path), holdout=0.1))


def test_too_few_rows_to_hold_one_out_is_a_message(
    write_file: WriteFile, renderer: ChatRenderer, tmp_path: Path
) -> None:
    write_file([chat()])
    (tmp_path / "out").mkdir()
    for share, found in ((0.001, "no row of it is held out"), (0.999, "every row of it is held")):
        with pytest.raises(DataError, match=found):
            recipe = DataRecipe(path=str(tmp_path), holdout=share)
            prepare_data(recipe, renderer, tmp_path / "out", HeardConsole(), SeenProgress())
