"""Whoever has only a model's folder finds the mode that it was trained in; all else stays."""

import json
from pathlib import Path

import pytest
from mlx_lm.utils import load_config

from mlx_ft.evaluate.targets import read_targets
from mlx_ft.model.chat import ChatFormat
from mlx_ft.model.thinking_mode import thinking_mode_of, write_thinking_mode
from mlx_ft.system.console import Console
from tests.support.models import write_tiny_model


def modes(folder: Path, asked: bool | None, suites: bool) -> bool:
    (target,) = read_targets(
        [str(folder)], enable_thinking=asked, default=ChatFormat(suites), console=Console()
    )
    return target.source.chat.enable_thinking


@pytest.mark.parametrize("mode", [True, False])
def test_what_is_written_is_read_and_all_else_stays(tmp_path: Path, mode: bool) -> None:
    file = tmp_path / "generation_config.json"
    said = {"eos_token_id": [1, 2], "temperature": 0.6}
    kept = {"default_chat_template_kwargs": {"date_string": "today", "enable_thinking": not mode}}
    file.write_text(json.dumps(said | kept))
    write_thinking_mode(tmp_path, mode)
    assert thinking_mode_of(tmp_path) is mode
    wanted = {"date_string": "today", "enable_thinking": mode}
    assert json.loads(file.read_text()) == said | {"default_chat_template_kwargs": wanted}


def test_a_new_file_has_the_stop_tokens_that_the_config_has(tmp_path: Path) -> None:
    """transformers looks for them in the config only where there is no such file."""
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "model_type": "llama"}')
    before = load_config(tmp_path)
    write_thinking_mode(tmp_path, False)
    said = json.loads((tmp_path / "generation_config.json").read_text())
    assert said["eos_token_id"] == 2 and "model_type" not in said
    assert load_config(tmp_path) == before, "mlx-lm reads what it read"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"default_chat_template_kwargs": 1}',
        '{"default_chat_template_kwargs": {"enable_thinking": "yes"}}',
    ],
)
def test_a_folder_that_names_no_mode_has_none(tmp_path: Path, text: str) -> None:
    assert thinking_mode_of(tmp_path) is None
    (tmp_path / "generation_config.json").write_text(text)
    assert thinking_mode_of(tmp_path) is None


def test_a_folder_is_asked_in_its_own_mode_unless_another_is_asked_for(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    assert [modes(folder, None, suites) for suites in (True, False)] == [True, False]
    write_thinking_mode(folder, True)
    assert modes(folder, None, False) is True
    assert modes(folder, False, True) is False
