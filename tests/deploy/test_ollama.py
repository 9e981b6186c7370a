"""The Modelfile says what the model's own template says, and Ollama gets the right arguments."""

import io
import os
import stat
from pathlib import Path

import pytest
from gguf import GGUFWriter

from mlx_ft.deploy.ollama import adds_first_token, install_ollama, modelfile, template_for
from mlx_ft.errors import GateFailed, RunError
from mlx_ft.model.chat import ChatFormat, ChatRenderer
from mlx_ft.system.console import Console
from mlx_ft.system.files import file_sha256, read_json, write_json

OLLAMA = """#!/bin/sh
printf '%s\\n' "$*" >> "$OLLAMA_LOG"
case "$1" in
  create) exit ${OLLAMA_CREATE_CODE:-0} ;;
  run) printf '%b' "${OLLAMA_SAYS:-I am a tiny model.}" ;;
esac
"""


def write_gguf(path: Path, add_bos: bool | None = None) -> Path:
    writer = GGUFWriter(str(path), "llama")
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def run_with_gguf(finished_run: Path) -> Path:
    """A finished run whose export has a GGUF file (of no tensors: nobody reads them here)."""
    path = write_gguf(finished_run / "export" / "tiny.gguf", add_bos=False)
    manifest = read_json(finished_run / "export" / "manifest.json")
    size = path.stat().st_size
    manifest["files"]["tiny.gguf"] = {"sha256": file_sha256(path), "bytes": size}
    manifest["info"]["gguf"] = {"path": "tiny.gguf", "bytes": size, "kind": "q8_0"}
    write_json(finished_run / "export" / "manifest.json", manifest)
    return finished_run


@pytest.fixture
def ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command `ollama` that writes down what it is asked; returns that file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "ollama"
    script.write_text(OLLAMA)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OLLAMA_LOG", str(tmp_path / "ollama.log"))
    return tmp_path / "ollama.log"


def install(run: Path, name: str | None = None) -> list[str]:
    return list(install_ollama(run, name=name, console=Console(io.StringIO())))


def test_a_run_goes_into_ollama_and_one_answer_is_looked_at(
    run_with_gguf: Path, ollama: Path
) -> None:
    out = install(run_with_gguf)
    path = run_with_gguf / "export" / "Modelfile"
    name = run_with_gguf.name
    assert ollama.read_text().splitlines() == [
        f"create {name} -f {path}",
        f"run {name} Hello, who are you?",
    ]
    assert out == [
        f"modelfile {path}",
        "answer   I am a tiny model.",
        f"next     ollama run {name}",
    ]
    lines = path.read_text().splitlines()
    assert lines[0] == "FROM ./tiny.gguf"
    assert lines[-1] == 'PARAMETER stop "<|im_end|>"'
    assert not any(line.startswith("SYSTEM") for line in lines)


def test_without_ollama_the_line_to_type_is_printed(
    run_with_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    out = install(run_with_gguf, "mine")
    path = run_with_gguf / "export" / "Modelfile"
    assert out[-1] == f"next     ollama create mine -f {path}" and path.exists()


def test_without_a_gguf_the_key_to_set_is_named(finished_run: Path, ollama: Path) -> None:
    with pytest.raises(RunError, match="no GGUF file") as caught:
        install(finished_run)
    assert "export.gguf: q8_0" in caught.value.faults[0].fix
    assert not ollama.exists() and not (finished_run / "export" / "Modelfile").exists()


def test_a_gguf_that_changed_does_not_leave(run_with_gguf: Path, ollama: Path) -> None:
    path = run_with_gguf / "export" / "tiny.gguf"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="not the file that the export wrote"):
        install(run_with_gguf)
    assert not ollama.exists()


def test_an_ollama_that_fails_is_a_message(
    run_with_gguf: Path, ollama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_CREATE_CODE", "1")
    with pytest.raises(RunError, match="ollama create") as caught:
        install(run_with_gguf)
    assert "ollama serve" in caught.value.faults[0].fix


def test_a_model_that_loops_in_ollama_is_stopped(
    run_with_gguf: Path, ollama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_SAYS", "Hotep " * 40 + "\\033[2J")
    with pytest.raises(GateFailed, match="bad answer") as caught:
        install(run_with_gguf)
    assert "\x1b" not in str(caught.value) and "ollama rm" in str(caught.value)


@pytest.mark.parametrize(("stored", "adds"), [(True, True), (False, False), (None, True)])
def test_who_writes_the_first_token(tmp_path: Path, stored: bool | None, adds: bool) -> None:
    assert adds_first_token(write_gguf(tmp_path / "x.gguf", stored)) is adds


def test_what_is_no_gguf_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("not one of them")
    with pytest.raises(RunError, match="no GGUF file"):
        adds_first_token(tmp_path / "x.gguf")


def test_a_template_that_cannot_be_said_is_left_out_and_why(finished_run: Path) -> None:
    text = modelfile("x.gguf", None, ["<|im_end|>", 'a"b', "c\nd"])
    assert 'TEMPLATE """' not in text and "# No TEMPLATE" in text
    assert text.count("PARAMETER") == 1
    folder = finished_run / "export" / "q5"
    config = read_json(folder / "tokenizer_config.json")
    config["chat_template"] = "{{ messages | length }}" + config["chat_template"]
    write_json(folder / "tokenizer_config.json", config)
    renderer = ChatRenderer.from_folder(folder, ChatFormat())
    assert template_for(renderer, adds_bos=False) is None
