"""Faults of the pinned mlx-lm's reading of rows, each reproduced there and shown absent here.

When a new mlx-lm mends one of them, its half of the test fails: then the fault is history, and the
half can go.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.tuner import datasets
from mlx_lm.tuner.datasets import ChatDataset, load_dataset, load_local_dataset
from mlx_lm.tuner.trainer import iterate_batches
from mlx_lm.utils import load_tokenizer

from mlx_ft.data.render import render_split
from mlx_ft.data.rows import read_rows
from mlx_ft.data.sources import source_files
from mlx_ft.errors import DataError
from mlx_ft.model.chat import ChatFormat, ChatRenderer, RowRefused
from mlx_ft.recipe.schema import DataRecipe
from tests.support.models import write_tiny_model
from tests.support.tokenizers import CHATML_TEMPLATE

CONFIG = SimpleNamespace(mask_prompt=True)
# A prompt that ends with the beginning of a thought, and a conversation that has none.
THINKING_TEMPLATE = CHATML_TEMPLATE.replace(
    "{{ '<|im_start|>assistant\n' }}",
    "{{ '<|im_start|>assistant\n<think>\n' }}",
)
SWITCH_TEMPLATE = CHATML_TEMPLATE.replace(
    "{{ '<|im_start|>assistant\n' }}",
    "{{ '<|im_start|>assistant\n' }}"
    "{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)
assert THINKING_TEMPLATE != CHATML_TEMPLATE != SWITCH_TEMPLATE
Messages = list[dict[str, Any]]


def chat(*turns: str) -> Messages:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def with_template(folder: Path, template: str) -> Path:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": template}
    path.write_text(json.dumps(config))
    return folder


def renderer_of(folder: Path, enable_thinking: bool = False) -> ChatRenderer:
    return ChatRenderer.from_folder(folder, ChatFormat(enable_thinking))


def their_row(folder: Path, messages: Messages) -> tuple[list[int], int]:
    rows = ChatDataset([{"messages": messages}], load_tokenizer(folder), mask_prompt=True)
    ids, offset = rows.process(rows[0])
    return list(ids), int(offset)


def test_a_prompt_that_the_row_does_not_begin_with_masks_the_answer(folder: Path) -> None:
    with_template(folder, THINKING_TEMPLATE)
    renderer = renderer_of(folder)
    messages = chat("what is it?", "a fox")
    ids, offset = their_row(folder, messages)
    answer = renderer.decode_raw(ids[offset:])
    assert "fox" not in answer, "theirs: the answer counts as prompt, nothing of it is trained"
    with pytest.raises(RowRefused, match="not a token prefix"):
        renderer.training_row(messages, mask_prompt=True)


def test_thinking_is_switched_by_the_tokenizer_and_not_by_the_recipe(folder: Path) -> None:
    """Theirs asks the template for thoughts whenever the tokenizer knows a thinking token."""
    with_template(folder, SWITCH_TEMPLATE)
    tokenizer = load_tokenizer(folder)
    for has_thinking in (False, True):
        tokenizer._think_start = "<think>" if has_thinking else None
        text = tokenizer.apply_chat_template(
            chat("what?"), add_generation_prompt=True, tokenize=False
        )
        theirs = "</think>" not in tokenizer._tokenizer.apply_chat_template(
            chat("what?"), add_generation_prompt=True, tokenize=False, enable_thinking=True
        )
        assert theirs and ("</think>" in text) != tokenizer.has_thinking
    for enable_thinking in (False, True):
        prompt = renderer_of(folder, enable_thinking).prompt_ids(chat("what?"))
        said = renderer_of(folder).decode_raw(prompt)
        assert ("</think>" in said) == (not enable_thinking)


def test_only_the_last_answer_is_trained(folder: Path) -> None:
    messages = chat("one", "two", "three", "four")
    renderer = renderer_of(folder)
    ids, offset = their_row(folder, messages)
    assert "two" not in renderer.decode_raw(ids[offset:])
    row = renderer.training_row(messages, mask_prompt=True)
    trained = [token for token, flag in zip(row.ids, row.trained, strict=True) if flag]
    assert renderer.decode_raw(trained) == "two<|im_end|>four<|im_end|>"


def test_a_conversation_that_ends_with_the_user_trains_the_user(folder: Path) -> None:
    messages = chat("one", "two", "and a fox?")
    renderer = renderer_of(folder)
    ids, offset = their_row(folder, messages)
    assert "fox" in renderer.decode_raw(ids[offset:])
    row = renderer.training_row(messages, mask_prompt=True)
    trained = [token for token, flag in zip(row.ids, row.trained, strict=True) if flag]
    assert renderer.decode_raw(trained) == "two<|im_end|>"


def test_a_long_row_loses_its_end(folder: Path, tmp_path: Path) -> None:
    """So a model that is trained on it learns not to stop."""
    renderer = renderer_of(folder)
    messages = chat("what is it?", "a quick brown fox jumps over the lazy dog")
    ids, offset = their_row(folder, messages)
    limit = len(ids) - 3
    ((batch, _),) = iterate_batches([(ids, offset)], 1, limit)
    kept = batch[0].tolist()
    assert kept == ids[:limit] and not renderer.stop_ids.intersection(kept[offset:])

    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (messages, chat("a", "b"))))
    data = DataRecipe(path=str(tmp_path), max_seq_length=limit)
    split = render_split(path, read_rows(path).rows, renderer, data)
    assert split.overlong_lines == (1,) and split.tokens.lines.tolist() == [2]


@pytest.mark.parametrize(
    ("lines", "error", "ours"),
    [
        (['{"text": "a"}', ""], json.JSONDecodeError, None),
        (['{"messages": []}', '{"text": "a"}'], None, "train.jsonl:1"),
        (['{"messages": null}', '{"text": "a"}'], TypeError, "train.jsonl:1"),
        ([json.dumps({"messages": chat("a", "b")}), '{"text": "a"}'], KeyError, "train.jsonl:2"),
    ],
)
def test_a_broken_row_is_found_in_the_middle_of_the_run(
    folder: Path, tmp_path: Path, lines: list[str], error: type[Exception] | None, ours: str | None
) -> None:
    """Theirs names no file and no line, and comes when the row's turn comes."""
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def read_all() -> None:
        rows, _, _ = load_local_dataset(tmp_path, load_tokenizer(folder), CONFIG)
        for index in range(len(rows)):
            rows.process(rows[index])

    if error is not None:
        with pytest.raises(error) as caught:
            read_all()
        assert "train.jsonl" not in str(caught.value)
    problems = read_rows(tmp_path / "train.jsonl").problems
    found = " ".join(f"{problem.path.name}:{problem.line}" for problem in problems)
    assert (ours in found) if ours else not problems, found


def test_a_mistyped_path_is_downloaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(name: str, *rest: object) -> tuple[list[str], list[str], list[str]]:
        asked.append(name)
        return ["row"], ["row"], []

    monkeypatch.setattr(datasets, "load_hf_dataset", download)
    wrong = str(tmp_path / "mistyped")
    load_dataset(SimpleNamespace(data=wrong, train=True, test=False), load_tokenizer(folder))
    assert asked == [wrong]
    with pytest.raises(DataError, match="there is no such folder"):
        source_files(DataRecipe(path=wrong))
