"""A dataset is fetched once, through the real `datasets` package, and its rows are its own."""

import json
from pathlib import Path

import pytest

from mlx_ft.data.sources import data_inputs, read_splits
from mlx_ft.errors import DataError
from mlx_ft.recipe.data import HubRows
from mlx_ft.recipe.schema import DataRecipe
from mlx_ft.system.cache import cache_home
from tests.support.chats import TOOL_ROW, chat

pytest.importorskip("datasets")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset as a folder, which `datasets` reads as it reads one of the Hub."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, count in (("train", 12), ("validation", 3)):
        rows = [chat(f"question {n} of {split}", f"answer {n}", score=n) for n in range(count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    return folder


def test_its_rows_are_those_of_a_file(dataset: Path, tmp_path: Path) -> None:
    (dataset / "validation.jsonl").rename(tmp_path / "valid.jsonl")
    (tmp_path / "train.jsonl").write_text((dataset / "train.jsonl").read_text())
    plain = read_splits(DataRecipe(path=str(tmp_path)))["train"].rows
    assert read_splits(DataRecipe(path=f"hf:{dataset}", holdout=0.5))["train"].rows != ()
    fetched = read_splits(DataRecipe(path=f"hf:{dataset}", holdout=0.0001))["train"].rows
    assert fetched == plain


def test_both_splits_and_slices_of_them(dataset: Path) -> None:
    hf = HubRows(train_split="train[:5]", valid_split="validation")
    read = read_splits(DataRecipe(path=f"hf:{dataset}", hf=hf))
    assert [len(read[split].rows) for split in ("train", "valid")] == [5, 3]


def test_it_is_fetched_once(dataset: Path) -> None:
    data = DataRecipe(path=f"hf:{dataset}", hf=HubRows(valid_split="validation"))
    before = data_inputs(data)
    for file in dataset.iterdir():
        file.unlink()
    assert data_inputs(data) == before
    other = data.model_copy(update={"hf": HubRows(valid_split="train")})
    with pytest.raises(DataError, match="cannot be fetched"):
        data_inputs(other)
    left = [path.name for path in (cache_home() / "datasets").iterdir()]
    assert len(left) == 1, "nothing half-fetched"


def test_fields_that_only_some_rows_have_come_back_as_they_were(tmp_path: Path) -> None:
    """A table has one schema, so that fields are null where a row did not have them."""
    rows = [chat("hello", "hi", category="talk"), {**TOOL_ROW, "category": "tools"}]
    del rows[1]["tools"]
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_splits(DataRecipe(path=f"hf:{folder}", holdout=0.0001))
    (tmp_path / "train.jsonl").write_text((folder / "train.jsonl").read_text())
    (tmp_path / "valid.jsonl").write_text(json.dumps(chat("x?", "y")) + "\n")
    plain = read_splits(DataRecipe(path=str(tmp_path)))
    assert read["train"].problems == () and read["train"].rows == plain["train"].rows
