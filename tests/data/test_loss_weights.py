"""A token weighs what its place, its text and its row say, and nothing else weighs otherwise."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.data.field_mapping import RowKeys
from mlx_ft.data.loss_weights import span_weights
from mlx_ft.data.prepare import prepare_data
from mlx_ft.data.render import render_split
from mlx_ft.data.rows import read_rows
from mlx_ft.data.tokens import read_split
from mlx_ft.errors import DataError
from mlx_ft.model.chat import ChatFormat, ChatRenderer
from mlx_ft.recipe.schema import DataRecipe, LossWeight
from tests.support.narration import HeardConsole, SeenProgress
from tests.support.tokenizers import write_tiny_tokenizer

QUESTION = "what is the capital of France?"
ANSWER = 'execute_code("""read_file(path="src/main.py")""")'
Row = dict[str, Any]


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> ChatRenderer:
    folder = write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return ChatRenderer.from_folder(folder, ChatFormat())


def row(answer: str = ANSWER, **more: Any) -> Row:
    turns = [("user", QUESTION), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


def write(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("train", "valid"):
        text = "".join(json.dumps(each) + "\n" for each in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def weighed(tmp_path: Path, renderer: ChatRenderer, rows: list[Row], **data: Any) -> Any:
    """Return the split of some rows as the data stage writes it."""
    recipe = DataRecipe(path=str(write(tmp_path / "rows", rows)), **data)
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    prepare_data(recipe, renderer, out, HeardConsole(), SeenProgress())
    return read_split(out / "train.safetensors")


def test_without_rules_there_are_no_weights(tmp_path: Path, renderer: ChatRenderer) -> None:
    assert weighed(tmp_path, renderer, [row()]).weights is None
    same = weighed(
        tmp_path, renderer, [row()], loss_weights=[{"regex": "never there", "weight": 9}]
    )
    assert same.weights is None


def test_text_weighs_where_it_matches(tmp_path: Path, renderer: ChatRenderer) -> None:
    rules = [{"regex": r"execute_code\(", "weight": 3}, {"regex": "main", "weight": 0.5}]
    split = weighed(tmp_path, renderer, [row()], loss_weights=rules)
    ids, trained = split.row(0)
    weights = split.row_weights(0)
    heavy = renderer.decode_raw(ids[weights == 3].tolist())
    light = renderer.decode_raw(ids[weights == 0.5].tolist())
    assert "execute_code(" in heavy and "main" in light
    assert len(heavy) < len("execute_code(") + 8 and len(light) < len("main") + 8
    assert set(weights.tolist()) == {1.0, 3.0, 0.5} and trained[weights == 3].all()


def test_rows_and_prompts_weigh_what_is_said(tmp_path: Path, renderer: ChatRenderer) -> None:
    rows = [row(heft=2), row("hello"), row("again", heft=0.5)]
    split = weighed(tmp_path, renderer, rows, weight_field="heft")
    assert [set(split.row_weights(i).tolist()) for i in range(3)] == [{2.0}, {1.0}, {0.5}]
    settings = {"mask_prompt": False, "prompt_weight": 0.25, "weight_field": "heft"}
    split = weighed(tmp_path, renderer, rows, **settings)
    _, trained = split.row(0)
    spoken = np.array(renderer.training_row(rows[0]["messages"], mask_prompt=True).trained)
    assert trained[1:].all()
    assert (split.row_weights(0) == np.where(spoken, 2.0, 0.5)).all()


@pytest.mark.parametrize(
    ("rows", "data", "said"),
    [
        ([row(heft="much")], {"weight_field": "heft"}, "heft is .*not a weight"),
        ([row(heft=-1)], {"weight_field": "heft"}, "not a weight"),
        ([row(heft=True)], {"weight_field": "heft"}, "not a weight"),
        ([row(heft=0)], {"weight_field": "heft"}, "weigh 0"),
        (
            [{"text": "the quick brown fox"}],
            {"loss_weights": [{"regex": "fox", "weight": 2}]},
            "plain text cannot be weighed",
        ),
    ],
)
def test_weights_that_mean_nothing_are_refused_with_their_line(
    tmp_path: Path, renderer: ChatRenderer, rows: list[Row], data: Any, said: str
) -> None:
    with pytest.raises(DataError, match=f"train.jsonl:1: .*{said}"):
        weighed(tmp_path, renderer, rows, **data)


def test_what_a_recipe_cannot_mean_is_a_conflict() -> None:
    with pytest.raises(ValueError, match="not a regular expression"):
        DataRecipe.model_validate({"path": "x", "loss_weights": [{"regex": "(", "weight": 2}]})
    with pytest.raises(ValueError, match="mask_prompt leaves prompts out"):
        DataRecipe(path="x", prompt_weight=0.5)


@given(st.text("ab ", min_size=1, max_size=30), st.data())
def test_every_token_that_a_match_touches_weighs_and_no_other(
    text: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text)), max_size=6)) | {0, len(text)})
    spans = list(itertools.pairwise(cuts))
    rule = LossWeight(regex="ab+", weight=3)
    factors = span_weights(text, spans, [rule, rule])
    touched = [any(_in_match(text, i) for i in range(start, end)) for start, end in spans]
    assert factors.tolist() == [9.0 if hit else 1.0 for hit in touched]


def _in_match(text: str, place: int) -> bool:
    """Say, without regular expressions, whether a character belongs to an `a` with b's after it."""
    if text[place] == "a":
        return text[place + 1 : place + 2] == "b"
    before = text[:place].rstrip("b")
    return text[place] == "b" and before.endswith("a")


def test_a_token_of_no_characters_weighs_as_before() -> None:
    rule = LossWeight(regex="x*", weight=5)
    assert span_weights("abc", [(0, 3), (3, 3)], [rule]).tolist() == [1.0, 1.0]


def test_dropped_rows_take_their_weights_along(tmp_path: Path, renderer: ChatRenderer) -> None:
    rows = [row("a " * 200, heft=7), row("hello", heft=2)]
    path = write(tmp_path / "rows", rows) / "train.jsonl"
    recipe = DataRecipe(path=str(path.parent), weight_field="heft", max_seq_length=64)
    split = render_split(path, read_rows(path, RowKeys(weight="heft")).rows, renderer, recipe)
    weights = split.tokens.row_weights(0)
    assert weights is not None
    assert split.overlong_lines == (1,) and set(weights.tolist()) == {2.0}
