"""A template in Go says what the model's own says, or there is none.

The Go text is run here as Jinja, action by action; Go itself is not at hand.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest

from mlx_ft.deploy.ollama_template import (
    TurnTexts,
    compose,
    conversation,
    go_template,
    learn_turn_texts,
    without_first_token,
)
from mlx_ft.model.chat import ChatFormat, ChatRenderer, Message
from mlx_ft.system.files import read_json, write_json
from tests.support.paths import TOKENIZERS
from tests.support.tokenizers import CHATML_TEMPLATE, write_tiny_tokenizer

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' }}"
    "{{ (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
REFUSES_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system prompt') }}{% endif %}"
    "{{ '[' + message['role'] + ']' + message['content'] }}{% endfor %}[assistant]"
)
DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
COUNTS = "{% for m in messages %}{{ loop.index ~ m['content'] }}{% endfor %}>"
SHOUTS = "{% for m in messages %}<{{ m['content'] | upper }}>{% endfor %}"
ONLY_LAST = "<{{ messages[-1]['content'] }}>"
ACTIONS = {
    "$first := true": "{% set ns = namespace(first=true) %}",
    "range $i, $_ := .Messages": "{% for m in Messages %}",
    "$last := eq (len (slice $.Messages $i)) 1": "{% set last = loop.last %}",
    'if eq .Role "user"': "{% if m.role == 'user' %}",
    "if $first": "{% if ns.first %}",
    "if $.System": "{% if System %}",
    "$.System": "{{ System }}",
    "$first = false": "{% set ns.first = false %}",
    ".Content": "{{ m.content }}",
    "if $last": "{% if last %}",
    'else if eq .Role "assistant"': "{% elif m.role == 'assistant' %}",
    "else": "{% else %}",
}


def run_go(template: str, messages: Sequence[Message]) -> str:
    """Return what a template in Go says, by way of Jinja; KeyError for an action not known here."""
    opened: list[str] = []
    out, rest = "", template
    while "{{" in rest:
        text, _, rest = rest.partition("{{")
        action, _, rest = rest.partition("}}")
        action = action.strip()
        out += text
        if action == "end":
            out += {"range": "{% endfor %}", "if": "{% endif %}"}[opened.pop()]
            continue
        if action.split()[0] in ("range", "if"):
            opened.append(action.split()[0])
        out += ACTIONS[action]
    assert not opened
    environment = jinja2.Environment(keep_trailing_newline=True)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    return environment.from_string(out + rest).render(Messages=messages, System=system)


def renderer_of(folder: Path, template: str | None = None, **options: Any) -> ChatRenderer:
    if template is not None:
        write_tiny_tokenizer(folder)
        config = read_json(folder / "tokenizer_config.json")
        write_json(folder / "tokenizer_config.json", {**config, "chat_template": template})
    return ChatRenderer.from_folder(folder, ChatFormat(**options))


def learned(renderer: ChatRenderer) -> TurnTexts:
    texts = learn_turn_texts(renderer.prompt_text)
    assert texts is not None
    return texts


def require_same(renderer: ChatRenderer) -> str:
    """Check the Go text of a renderer's template on conversations it was not learned from."""
    texts = learned(renderer)
    template = go_template(texts)
    assert template is not None
    contents = ["Name a colour.", "Red,\n\nor blue: {x}", "Why?", 'For "no" reason', "So?"]
    for count in (1, 3, 5):
        for system in (None, "Speak plainly."):
            if system is not None and texts.before_system is None:
                continue
            messages = conversation(contents[:count], system)
            assert run_go(template, messages) == renderer.prompt_text(messages)
    return template


def test_chatml(tmp_path: Path) -> None:
    template = require_same(renderer_of(tmp_path, CHATML_TEMPLATE))
    assert template == (
        "{{ $first := true }}{{ range $i, $_ := .Messages }}"
        "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq .Role "user" }}{{ if $first }}'
        "{{ if $.System }}<|im_start|>system\n{{ $.System }}<|im_end|>\n<|im_start|>user\n"
        "{{ else }}<|im_start|>user\n{{ end }}{{ $first = false }}"
        "{{ else }}<|im_end|>\n<|im_start|>user\n{{ end }}"
        "{{ .Content }}{{ if $last }}<|im_end|>\n<|im_start|>assistant\n{{ end }}"
        '{{ else if eq .Role "assistant" }}<|im_end|>\n<|im_start|>assistant\n{{ .Content }}'
        "{{ end }}{{ end }}"
    )


@pytest.mark.parametrize("template", [GEMMA, REFUSES_SYSTEM, DEFAULT_SYSTEM])
def test_forms_of_chat_templates(tmp_path: Path, template: str) -> None:
    require_same(renderer_of(tmp_path, template))


def test_a_default_system_prompt_gives_way_to_a_given_one(tmp_path: Path) -> None:
    texts = learned(renderer_of(tmp_path, DEFAULT_SYSTEM))
    assert "You are helpful." in texts.start
    assert texts.before_system == "<|im_start|>system\n"


@pytest.mark.parametrize("thinking", [False, True])
def test_qwen3_keeps_its_thinking_mode(thinking: bool) -> None:
    folder = TOKENIZERS / "qwen3"
    if not folder.exists():
        pytest.skip("the real tokenizers are not here")
    template = require_same(renderer_of(folder, enable_thinking=thinking))
    assert ("<think>" in template) is not thinking


def test_llama_3_leaves_its_first_token_to_who_adds_it() -> None:
    folder = TOKENIZERS / "llama3_1"
    if not folder.exists():
        pytest.skip("the real tokenizers are not here")
    renderer = renderer_of(folder)
    require_same(renderer)
    texts = without_first_token(learned(renderer), renderer.tokenizer.bos_token)
    for system in (None, "Be brief."):
        messages = conversation(["Hello"], system)
        said = compose(texts, messages)
        assert "<|begin_of_text|>" + said == renderer.prompt_text(messages)


@pytest.mark.parametrize("template", [COUNTS, SHOUTS, ONLY_LAST])
def test_a_template_that_does_more_is_not_given_out(tmp_path: Path, template: str) -> None:
    assert learn_turn_texts(renderer_of(tmp_path, template).prompt_text) is None


@pytest.mark.parametrize("text", ['"""', "{{ x }}", "a\u00a0b", "a\x1b[2J", "a\rb"])
def test_what_a_modelfile_cannot_hold_is_not_written(text: str) -> None:
    assert go_template(TurnTexts("<", None, None, ">", "<", text)) is None
    assert go_template(TurnTexts("<", "s", text, ">", "<", ">")) is None
    assert go_template(TurnTexts("<", None, None, ">", "<", ">\n\t")) is not None
