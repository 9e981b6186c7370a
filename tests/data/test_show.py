"""What is shown as trained is what is trained."""

from pathlib import Path

import pytest

from mlx_ft.data.show import row_text, shown_rows
from mlx_ft.errors import DataError
from mlx_ft.model.chat import ChatRenderer
from mlx_ft.recipe.schema import DataRecipe
from tests.data.conftest import WriteFile
from tests.support.chats import chat, sentence


@pytest.fixture
def recipe(write_file: WriteFile, tmp_path: Path) -> DataRecipe:
    two = {"messages": chat("one", "two")["messages"] + chat("three", "four")["messages"]}
    write_file([chat("hello", "a fox"), two, chat("c", "d")])
    write_file([chat("e", "f")], "valid.jsonl")
    return DataRecipe(path=str(tmp_path))


def test_pieces_are_the_row_cut_where_training_begins_and_ends(
    recipe: DataRecipe, renderer: ChatRenderer
) -> None:
    first, second = shown_rows(recipe, renderer, "train", 2)
    assert [text for text, trained in first.pieces if trained] == ["a fox<|im_end|>"]
    assert [text for text, trained in second.pieces if trained] == [
        "two<|im_end|>",
        "four<|im_end|>",
    ]
    for row in (first, second):
        flags = [trained for _, trained in row.pieces]
        assert flags == [bool(index % 2) for index in range(len(flags))], "they alternate"
    whole = "".join(text for text, _ in first.pieces)
    assert whole.startswith("<|im_start|>user\nhello<|im_end|>")
    assert first.tokens > first.trained_tokens > 0


def test_lines_and_splits_are_chosen(recipe: DataRecipe, renderer: ChatRenderer) -> None:
    assert [row.line for row in shown_rows(recipe, renderer, "train", 1, [3, 2])] == [2, 3]
    assert [row.line for row in shown_rows(recipe, renderer, "valid", 9)] == [1]


def test_every_line_that_cannot_be_shown_is_named(
    write_file: WriteFile, recipe: DataRecipe, renderer: ChatRenderer
) -> None:
    write_file([chat("hello", "a fox"), b"", chat("long", "a fox " * 400)])
    short = recipe.model_copy(update={"max_seq_length": 64})
    with pytest.raises(DataError) as caught:
        list(shown_rows(short, renderer, "train", 1, [999, 1, 2, 3]))
    said = [str(fault) for fault in caught.value.faults]
    assert len(said) == 3
    assert "train.jsonl:2: there is no row in this line" in said[0]
    assert "train.jsonl:999: there is no row" in said[1] and "in line 3" in said[1]
    assert "train.jsonl:3: the row is longer than max_seq_length (64)" in said[2]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_line_of_the_other_side_is_told_where_it_is(
    split: str, write_file: WriteFile, renderer: ChatRenderer, tmp_path: Path
) -> None:
    write_file([chat(sentence(n, 12), f"answer {n}") for n in range(40)])
    recipe = DataRecipe(path=str(tmp_path), holdout=0.5)
    (other,) = {"train", "valid"} - {split}
    line = next(shown_rows(recipe, renderer, other, 1)).line
    with pytest.raises(DataError, match=rf"train\.jsonl:{line}: .* - add --split {other}"):
        list(shown_rows(recipe, renderer, split, 1, [line]))


def test_rows_that_are_too_long_are_not_among_the_first(
    write_file: WriteFile, recipe: DataRecipe, renderer: ChatRenderer
) -> None:
    write_file([chat("long", "a fox " * 400), chat("hello", "a fox"), chat("c", "d")])
    short = recipe.model_copy(update={"max_seq_length": 64})
    assert [row.line for row in shown_rows(short, renderer, "train", 1)] == [2]
    write_file([chat("long", "a fox " * 400)])
    with pytest.raises(DataError, match="all 1 rows are longer than max_seq_length"):
        list(shown_rows(short, renderer, "train", 1))


def test_a_broken_split_is_a_message(
    write_file: WriteFile, recipe: DataRecipe, renderer: ChatRenderer
) -> None:
    write_file([b"{broken"])
    with pytest.raises(DataError, match=r"train\.jsonl:1"):
        list(shown_rows(recipe, renderer, "train", 1))


def test_text_shows_what_is_trained_with_and_without_colour(
    write_file: WriteFile, recipe: DataRecipe, renderer: ChatRenderer
) -> None:
    write_file([chat("hel\x1b[31mlo", "a fox")])
    (row,) = shown_rows(recipe, renderer, "train", 1)
    plain, colored = row_text(row, False), row_text(row, True)
    assert "\u00aba fox<|im_end|>\u00bb" in plain and "\x1b" not in plain
    assert "\x1b[1;32ma fox<|im_end|>\x1b[0m" in colored
    assert "\x1b[31m" not in colored, "a row cannot steer the terminal"
    assert plain.startswith(f"line 1: {row.tokens} tokens, {row.trained_tokens} of them trained\n")
