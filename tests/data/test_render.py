"""Rows become exactly what the renderer says, whole or not at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_ft.data.render import RenderedSplit, render_split
from mlx_ft.data.rows import read_rows
from mlx_ft.model.chat import ChatFormat, ChatRenderer
from mlx_ft.recipe.schema import DataRecipe
from tests.data.conftest import WriteFile
from tests.support.chats import TOOL_ROW, chat
from tests.support.paths import TOKENIZERS
from tests.support.tokenizers import CHATML_TEMPLATE, write_tiny_tokenizer

LONG = "the quick brown fox " * 40


def rendered(path: Path, renderer: ChatRenderer, **recipe: Any) -> RenderedSplit:
    read = read_rows(path)
    assert read.problems == ()
    return render_split(path, read.rows, renderer, DataRecipe(path=str(path.parent), **recipe))


def trained_text(split: RenderedSplit, index: int, renderer: ChatRenderer) -> str:
    ids, trained = split.tokens.row(index)
    return renderer.decode_raw(ids[trained != 0].tolist())


def test_rows_are_the_renderers_own(renderer: ChatRenderer, write_file: WriteFile) -> None:
    rows = [chat(), TOOL_ROW, chat("what?", "a fox")]
    path = write_file(rows)
    split = rendered(path, renderer)
    assert split.tokens.lines.tolist() == [1, 2, 3]
    for index, row in enumerate(split.kept):
        assert row.messages is not None
        expected = renderer.training_row(row.messages, row.tools, mask_prompt=True)
        ids, trained = split.tokens.row(index)
        assert tuple(ids) == expected.ids
        assert tuple(trained.astype(bool)) == expected.trained


def test_every_assistant_turn_is_trained_with_its_stop_token_and_nothing_else(
    renderer: ChatRenderer, write_file: WriteFile
) -> None:
    two_turns = {"messages": chat("one", "two")["messages"] + chat("three", "four")["messages"]}
    split = rendered(write_file([two_turns]), renderer)
    assert trained_text(split, 0, renderer) == "two<|im_end|>four<|im_end|>"


def test_without_masking_all_but_the_first_token_is_trained(
    renderer: ChatRenderer, write_file: WriteFile
) -> None:
    split = rendered(write_file([chat()]), renderer, mask_prompt=False)
    assert split.tokens.trained.tolist() == [0] + [1] * (len(split.tokens.ids) - 1)


def test_plain_text_is_trained_to_its_end_token(
    renderer: ChatRenderer, write_file: WriteFile
) -> None:
    split = rendered(write_file([{"text": "the quick brown fox"}]), renderer)
    assert renderer.decode_raw(split.tokens.ids.tolist()) == "the quick brown fox<|im_end|>"
    assert split.tokens.trained.tolist() == [0] + [1] * (len(split.tokens.ids) - 1)


def test_a_long_row_is_left_out_whole_and_the_others_are_untouched(
    renderer: ChatRenderer, write_file: WriteFile
) -> None:
    path = write_file([chat(), chat(answer=LONG), chat("what?", "a fox")])
    free, limited = rendered(path, renderer), rendered(path, renderer, max_seq_length=100)
    assert limited.overlong_lines == (2,)
    assert limited.tokens.lines.tolist() == [1, 3]
    assert limited.all_lengths == free.all_lengths == tuple(free.tokens.lengths)
    assert np.array_equal(limited.tokens.row(1)[0], free.tokens.row(2)[0])


def test_a_row_of_exactly_the_longest_length_is_kept(
    renderer: ChatRenderer, write_file: WriteFile
) -> None:
    path = write_file([chat()])
    length = int(rendered(path, renderer).tokens.lengths[0])
    assert len(rendered(path, renderer, max_seq_length=length).kept) == 1
    assert len(rendered(path, renderer, max_seq_length=length - 1).kept) == 0


def test_refuse_names_every_long_row(renderer: ChatRenderer, write_file: WriteFile) -> None:
    path = write_file([chat(answer=LONG), chat(), chat(LONG)])
    split = rendered(path, renderer, max_seq_length=100, overlong="refuse")
    assert [problem.line for problem in split.problems] == [1, 3]


def renderer_with_template(folder: Path, template: str) -> ChatRenderer:
    write_tiny_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return ChatRenderer.from_folder(folder, ChatFormat())


def test_the_first_token_is_no_target_even_where_an_answer_starts_the_row(
    tmp_path: Path, write_file: WriteFile
) -> None:
    bare = (
        "{% for m in messages if m['role'] != 'system' %}"
        "{{ m['content'] + '<|im_end|>' }}"
        "{% endfor %}"
    )
    other = renderer_with_template(tmp_path / "bare", bare)
    system = {"role": "system", "content": "this template does not say me"}
    split = rendered(write_file([{"messages": [system, chat()["messages"][1]]}]), other)
    assert split.problems == ()
    assert split.tokens.row(0)[1].tolist() == [0] + [1] * (len(split.tokens.row(0)[0]) - 1)


def test_what_the_template_refuses_is_a_problem_with_its_line(
    tmp_path: Path, write_file: WriteFile
) -> None:
    strict = CHATML_TEMPLATE.replace("'system', ", "")
    other = renderer_with_template(tmp_path / "strict", strict)
    with_system = {"messages": [{"role": "system", "content": "be brief"}, *chat()["messages"]]}
    split = rendered(write_file([chat(), with_system, chat()]), other)
    assert [problem.line for problem in split.problems] == [2]
    assert "unknown role system" in split.problems[0].found
    assert split.tokens.lines.tolist() == [1, 3]


def test_a_template_that_loses_tool_calls_cannot_train_them(
    renderer: ChatRenderer, tmp_path: Path, write_file: WriteFile
) -> None:
    path = write_file([TOOL_ROW, chat()])
    assert "lint" in trained_text(rendered(path, renderer), 0, renderer)
    start, end = CHATML_TEMPLATE.index("{% for call"), CHATML_TEMPLATE.index("{{ '<|im_end|>")
    without_calls = CHATML_TEMPLATE[:start] + CHATML_TEMPLATE[end:]
    other = renderer_with_template(tmp_path / "without", without_calls)
    split = rendered(path, other)
    assert [(p.line, p.found) for p in split.problems] == [
        (1, "the chat template leaves out the tool call to lint")
    ]
    assert split.tokens.lines.tolist() == [2]


def test_tools_that_the_template_does_not_show_are_counted(
    renderer: ChatRenderer, tmp_path: Path, write_file: WriteFile
) -> None:
    tools = [{"type": "function", "function": {"name": "find_references"}}]
    path = write_file([chat(tools=tools), chat(tools=[{"type": "builtin"}]), chat()])
    assert rendered(path, renderer).toolless_lines == (1,)
    shows = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML_TEMPLATE
    other = renderer_with_template(tmp_path / "shows", shows)
    assert rendered(path, other).toolless_lines == ()


@pytest.mark.parametrize("name", ["qwen3", "llama3_1"])
def test_real_templates_train_answers_and_tool_calls(name: str, write_file: WriteFile) -> None:
    if not (TOKENIZERS / name).exists():
        pytest.skip(f"needs the {name} tokenizer")
    real = ChatRenderer.from_folder(TOKENIZERS / name, ChatFormat())
    calls = TOOL_ROW | {"messages": TOOL_ROW["messages"][:3]}
    as_text = json.loads(json.dumps(calls))
    function = as_text["messages"][2]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    path = write_file([chat("2 + 2?", "It is 4."), calls, as_text])
    split = render_split(path, read_rows(path).rows, real, DataRecipe(path=str(path.parent)))
    texts = [trained_text(split, index, real) for index in range(len(split.tokens))]
    assert texts[0].startswith("It is 4.")
    refused = [problem.line for problem in split.problems]
    assert refused == ([2, 3] if name == "llama3_1" else [])  # that template knows no calls
    if not refused:
        assert texts[1] == texts[2]
        assert '{"name": "lint", "arguments": {"path": "a.py", "n": 1}}' in texts[1]
