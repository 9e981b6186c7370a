"""What a model is asked is what its template, which is the one trained with, makes of messages.

No public function that leads to an answer takes a prompt that is a text.
"""

import importlib
import inspect
import json
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import mlx_ft
from mlx_ft.engine.generate import generate
from mlx_ft.engine.load import LoadedModel, load_model
from mlx_ft.errors import MlxFtError, ModelError
from mlx_ft.evaluate.chat_fingerprint import compare_template
from mlx_ft.evaluate.column import Column, Question
from mlx_ft.evaluate.harness import evaluate, questions_of
from mlx_ft.model.chat import ChatFormat, ChatRenderer
from tests.support.harnesses import Scripted, column_of, fine, make_suite
from tests.support.models import write_tiny_model
from tests.support.narration import SeenProgress
from tests.support.paths import TOKENIZERS
from tests.support.tokenizers import write_tiny_tokenizer

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "lint",
            "description": "Check a file.",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
        },
    },
)
MESSAGES = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Zwölf\n\tBoxkämpfer 🦊 <|im_end|> 12345"},
)


def open_renderer(folder: Path, thinking: bool = False, date: str = "2025-01-01") -> ChatRenderer:
    return ChatRenderer.from_folder(folder, ChatFormat(thinking, date))


# --- the ids are the template's


@pytest.mark.parametrize(
    ("name", "thinking"), [("qwen3", False), ("qwen3", True), ("llama3_1", False)]
)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("messages", [MESSAGES, MESSAGES[1:]])
def test_a_question_is_rendered_as_transformers_renders_it(
    name: str, thinking: bool, tools: Any, messages: Any
) -> None:
    if not (TOKENIZERS / name).exists():
        pytest.skip(f"needs the {name} tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(str(TOKENIZERS / name))
    renderer = open_renderer(TOKENIZERS / name, thinking)
    suite = make_suite()
    sample = replace(suite.samples[0], messages=messages, tools=tools)
    (question,) = questions_of(replace(suite, samples=(sample,)), renderer)
    expected = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=None if tools is None else list(tools),
        chat_template=renderer.pinned_template(),
        add_generation_prompt=True,
        enable_thinking=thinking,
        tokenize=True,
        return_dict=False,
    )
    assert list(question.ids or ()) == expected
    if tools is not None and name == "qwen3":  # the other template at hand knows no tools
        assert "lint" in tokenizer.decode(expected)
    if tokenizer.bos_token_id is not None:
        assert expected.count(tokenizer.bos_token_id) == 1, "one BOS, never two"


def test_a_tokenizer_that_adds_a_bos_by_itself_adds_none_to_a_rendered_prompt(
    tmp_path: Path,
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    folder = write_tiny_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text())
    values["chat_template"] = "{{ bos_token }}" + values["chat_template"]
    config.write_text(json.dumps(values))
    renderer = open_renderer(folder)
    assert renderer.tokenizer("x")["input_ids"][0] == 0, "it does add one to plain text"
    for question in questions_of(make_suite(), renderer):
        assert question.ids is not None
        assert question.ids[0] == 0 and question.ids.count(0) == 1


def test_a_template_without_tools_is_told_of(tmp_path: Path) -> None:
    renderer = open_renderer(write_tiny_tokenizer(tmp_path / "tokenizer"))
    suite = make_suite()
    asked = replace(suite, samples=(replace(suite.samples[0], tools=TOOLS),))
    loaded = LoadedModel(None, renderer, {}, "")
    column = column_of(loaded, Scripted(fine))
    told = evaluate([asked], [column], tmp_path, progress=SeenProgress())["warnings"]
    assert told == ["base: its chat template does not show the tools of suite chat"]
    assert evaluate([suite], [column], tmp_path, progress=SeenProgress())["warnings"] == []


# --- the template is the one trained with


def changed(folder: Path, how: str) -> dict[str, Any]:
    """Change one thing of a tokenizer folder, or return the options that do."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if how == "one character":
        config["chat_template"] = config["chat_template"].replace("unknown role ", "unknown role: ")
    elif how == "stop token":
        config["eos_token"] = "<|endoftext|>"
    elif how == "special token":
        config["pad_token"] = "<|im_start|>"
        config["bos_token"] = "<|im_start|>"
        config["unk_token"] = "<|im_start|>"
    elif how == "rendering":
        config["chat_template"] += "{{ ' ' }}"
    path.write_text(json.dumps(config))
    options: dict[str, dict[str, Any]] = {
        "thinking": {"thinking": True},
        "date": {"date": "2025-01-02"},
    }
    return options.get(how, {})


CHANGES = {
    "one character": "template_sha256",
    "rendering": "canonical_prompts",
    "stop token": "stop_ids",
    "special token": "special_tokens",
    "thinking": "enable_thinking",
    "date": "date",
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_changed_chat_format_is_refused_and_named(how: str, tmp_path: Path) -> None:
    trained = open_renderer(write_tiny_tokenizer(tmp_path / "trained")).fingerprint()
    folder = write_tiny_tokenizer(tmp_path / "now")
    renderer = open_renderer(folder, **changed(folder, how))
    suite = make_suite(enable_thinking=renderer.chat.enable_thinking, stop=())
    script = Scripted(fine)
    loaded = LoadedModel(None, renderer, {}, "")
    column = column_of(loaded, script, trained_with=trained)
    with pytest.raises(ModelError) as caught:
        evaluate([suite], [column], tmp_path / "eval", progress=SeenProgress())
    assert any(CHANGES[how] in fault.where for fault in caught.value.faults)
    assert script.prompts == [] and not (tmp_path / "eval").exists()

    (tmp_path / "eval").mkdir()
    results = evaluate(
        [suite], [column], tmp_path / "eval", progress=SeenProgress(), allow_template_mismatch=True
    )
    assert results["columns"]["base"]["template"] == "mismatch"
    assert "MEASURED WITH ANOTHER CHAT FORMAT" in results["warnings"][0]
    assert any(CHANGES[how] in warning for warning in results["warnings"][1:])


def test_the_same_format_and_an_unknown_one_are_told_apart(tmp_path: Path) -> None:
    renderer = open_renderer(write_tiny_tokenizer(tmp_path))
    loaded = LoadedModel(None, renderer, {}, "")
    same = column_of(loaded, Scripted(fine), trained_with=renderer.fingerprint())
    assert compare_template(same, allow_mismatch=False).state == "same"
    assert compare_template(column_of(loaded, Scripted(fine)), allow_mismatch=False).state == "own"
    server = replace(same, renderer=None)
    check = compare_template(server, allow_mismatch=False)
    assert check.state == "unknown" and "could not be compared" in check.warnings[0]


# --- no prompt is a text


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield each public function and method of the package, by its full name."""
    for module_info in pkgutil.walk_packages(mlx_ft.__path__, "mlx_ft."):
        name = module_info.name
        # These need what is not installed everywhere, or are programs.
        if name in (
            "mlx_ft.evaluate.lm_eval_model",
            "mlx_ft.__main__",
            "mlx_ft.deploy.server_process",
        ):
            continue
        module = importlib.import_module(name)
        for key, value in vars(module).items():
            if key.startswith("_") or getattr(value, "__module__", "") != name:
                continue
            if inspect.isfunction(value):
                yield f"{name}.{key}", value
            elif inspect.isclass(value):
                for method, function in vars(value).items():
                    if inspect.isfunction(function) and not method.startswith("_"):
                        yield f"{name}.{key}.{method}", function


def is_text(annotation: Any) -> bool:
    """Return whether an annotation lets a text through that is no name, path or option."""
    if annotation in (str, bytes):
        return True
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, list, tuple, set) or (
        inspect.isclass(origin) and issubclass(origin, Iterable)
    ):
        mapping = inspect.isclass(origin) and issubclass(origin, Mapping)
        return not mapping and any(is_text(argument) for argument in arguments)
    return False


ASKING = ("prompt", "prompts", "question", "questions", "messages", "context", "conversation")


def test_no_public_function_takes_a_prompt_that_is_a_text() -> None:
    """Whatever is asked is messages, Question objects, or ids that the renderer has made."""
    seen = []
    for name, function in public_functions():
        try:
            hints = typing.get_type_hints(function)
        except NameError:  # of imports that are for types only
            hints = dict(function.__annotations__)
        for parameter in inspect.signature(function).parameters:
            if parameter not in ASKING:
                continue
            seen.append(name)
            hint = hints.get(parameter)
            written = hint if isinstance(hint, str) else ""
            assert not is_text(hint), f"{name}({parameter}: {hint})"
            assert written.replace(" ", "") not in ("str", "Sequence[str]", "str|None"), name
    assert {
        "mlx_ft.engine.generate.generate",
        "mlx_ft.engine.decoding.answer_prompts",
        "mlx_ft.engine.likelihood.likelihoods",
        "mlx_ft.model.chat.ChatRenderer.prompt_ids",
        "mlx_ft.evaluate.local_model.LocalModel.answer",
        "mlx_ft.evaluate.endpoint.Endpoint.answer",
    } <= set(seen), "the walk does not find what answers"


def test_a_text_in_place_of_a_conversation_is_refused_at_every_door(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    loaded = load_model(folder, ChatFormat())
    renderer = loaded.renderer
    bare: Any = "Hello"
    suite = make_suite()
    sample = replace(suite.samples[0], messages=bare)

    def ask(renderer: ChatRenderer | None) -> None:
        column = Column("base", "0" * 64, renderer, column_of(loaded, "model").open)
        made = replace(suite, samples=(sample,))
        evaluate([made], [column], tmp_path / "out", progress=SeenProgress())

    doors: dict[str, Callable[[], Any]] = {
        "renderer": lambda: renderer.prompt_ids(bare),
        "rendered text": lambda: renderer.prompt_text(bare),
        "training": lambda: renderer.training_row(bare, mask_prompt=True),
        "generate": lambda: generate(loaded, [bare], max_tokens=2),
        "a question": lambda: Question(bare, None, None, 8),
        "harness": lambda: ask(renderer),
        "server": lambda: ask(None),
    }
    for name, door in doors.items():
        with pytest.raises(TypeError):
            door()
            pytest.fail(f"{name} took a text")
    assert not issubclass(TypeError, MlxFtError)
