"""A model is looked at as it is: facts from its files, its own template, its own answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_ft.engine import load
from mlx_ft.errors import GateFailed
from mlx_ft.evaluate.probe import (
    QUESTIONS,
    Probe,
    ProbeAnswer,
    chat_facts,
    model_facts,
    probe,
    probe_file,
    probe_lines,
    record,
)
from mlx_ft.model.chat import ChatFormat, ChatRenderer
from mlx_ft.model.resolve import resolve_model
from mlx_ft.system.console import Console
from tests.support.jobs import write_place
from tests.support.models import write_tiny_model


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = write_tiny_model(tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: a/b\n---\n# Tiny\n")
    return folder


def renderer(folder: Path, thinking: bool) -> ChatRenderer:
    return ChatRenderer.from_folder(folder, ChatFormat(thinking))


def test_facts_are_those_of_config_and_card(tiny: Path) -> None:
    facts = model_facts(resolve_model(str(tiny), None, Console()))
    assert facts["model_type"] == "llama" and facts["num_hidden_layers"] == 2
    assert facts["license"] == "apache-2.0" and facts["base_model"] == "a/b"
    assert facts["adaptable_modules"][-1] == "self_attn.v_proj"
    assert facts["gguf"] == "can be written"


def test_what_the_template_does_is_found_by_rendering(tiny: Path) -> None:
    facts = chat_facts(renderer(tiny, False), renderer(tiny, True))
    assert facts["prompt"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert facts["system_messages"] and not facts["tools"] and not facts["thinking_modes"]
    assert facts["stop_tokens"] == ["<|im_end|>"]
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    more = "{% if tools %}{{ tools | tojson }}{% endif %}{% if enable_thinking %}think{% endif %}"
    config["chat_template"] = more + config["chat_template"]
    (tiny / "tokenizer_config.json").write_text(json.dumps(config))
    facts = chat_facts(renderer(tiny, False), renderer(tiny, True))
    assert facts["tools"] and facts["thinking_modes"]


def test_a_random_model_is_stopped_and_not_written_down(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its answers are real, and there for whoever wants to see why."""
    with pytest.raises(GateFailed):
        probe(str(tiny), None, False, (), Console())
    said = capsys.readouterr().err
    assert all(question in said for question in QUESTIONS)
    assert not probe_file(resolve_model(str(tiny), None, Console())).exists()


def test_the_suites_are_asked_of_the_model_that_was_looked_at(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are read once, and its random answers let pass so that the suite is asked."""
    write_place(tiny.parent)
    read: list[Path] = []
    plain = load.load_weights

    def counted(folder: Path, low_memory: bool = False) -> Any:
        read.append(folder)
        return plain(folder, low_memory)

    monkeypatch.setattr(load, "load_weights", counted)
    monkeypatch.setattr("mlx_ft.evaluate.probe.TOO_MANY_DEGENERATE", len(QUESTIONS) + 1)
    probe(str(tiny), None, False, [tiny.parent / "suite.yaml"], Console())
    assert len(read) == 1
    assert "over 3 prompts" in capsys.readouterr().err
    assert probe_file(resolve_model(str(tiny), None, Console())).exists()


def found(tiny: Path, *answers: ProbeAnswer) -> Probe:
    model = resolve_model(str(tiny), None, Console())
    chat = chat_facts(renderer(tiny, False), renderer(tiny, True))
    return Probe(model.info(), model_facts(model), chat, answers)


def test_a_sound_model_is_written_down_for_the_family_check(tiny: Path) -> None:
    file = probe_file(resolve_model(str(tiny), None, Console()))
    record(found(tiny, ProbeAnswer("Hello!", "Hi.", "stop", None)), file)
    stored = json.loads(file.read_text())
    assert stored["answers"][0]["text"] == "Hi." and stored["facts"]["model_type"] == "llama"


def test_what_a_model_says_cannot_steer_the_terminal(tiny: Path) -> None:
    lines = "\n".join(
        probe_lines(found(tiny, ProbeAnswer("Hello!", "\x1b[31mred\u202e", "stop", None)))
    )
    assert "\x1b" not in lines and "\u202e" not in lines and "red" in lines
