"""A real server of a real run: it answers as `mlx-ft chat` does, and ends when it is told to."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_ft.deploy import serve as module
from mlx_ft.deploy.chat import chat_turns
from mlx_ft.deploy.serve import base_url, curl_line, require_free_port, serve, server_command
from mlx_ft.errors import RunError
from mlx_ft.runs.models import read_run
from mlx_ft.system.console import Console
from tests.support.jobs import job_of
from tests.support.ports import free_port

QUESTION = "quick brown 1"
MAX_TOKENS = 12


@contextmanager
def served(run: Path, column: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Yield the process of `mlx-ft serve` and the URL that it prints."""
    port = free_port()
    command = [sys.executable, "-m", "mlx_ft", "serve", str(run), "--column", column]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        if not lines[-1].startswith("next     curl "):
            process.kill()
            pytest.fail(f"it is not served: {lines}, {process.communicate()[1]}")
        url = lines[0].split()[1]
        assert url == f"http://127.0.0.1:{port}/v1"
        yield process, url
    finally:
        process.kill()
        process.communicate()


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def answer(url: str, **options: Any) -> str:
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": MAX_TOKENS}
    reply = ask(url, "chat/completions", {**body, **options})
    return str(reply["choices"][0]["message"]["content"])


def wait_until_closed(url: str) -> None:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            ask(url, "models")
        except (urllib.error.URLError, OSError):
            return
        time.sleep(0.2)
    pytest.fail("somebody still answers")


def test_an_openai_client_hears_what_chat_says(finished_run: Path, finished: Path) -> None:
    said = {
        column: next(chat_turns(job_of(finished), column, MAX_TOKENS, [QUESTION]))
        for column in ("base", "quantized")
    }
    assert said["base"] != said["quantized"]
    with served(finished_run, "quantized") as (process, url):
        assert answer(url, model=finished_run.name) == said["quantized"]
        assert answer(url) == said["quantized"]
        assert answer(url, model="gpt-4o") == said["quantized"], "there is only one model"
        listed = ask(url, "models")["data"]
        assert [each["id"] for each in listed] == [finished_run.name]
        process.send_signal(signal.SIGINT)
        out, narration = process.communicate(timeout=20)
        assert process.returncode == 130, narration
        assert out == "" and "Traceback" not in narration and "no longer served" in narration
        wait_until_closed(url)


def test_the_adapter_is_on_whatever_model_is_named(finished_run: Path, finished: Path) -> None:
    """mlx-lm's own server loads the base without the adapter when a client names its folder."""
    said = next(chat_turns(job_of(finished), "adapter", MAX_TOKENS, [QUESTION]))
    base = read_run(finished_run).record["model"]["path"]
    with served(finished_run, "adapter") as (process, url):
        assert answer(url, model=base) == said
        assert answer(url) == said
        process.kill()
        process.wait()
        wait_until_closed(url)


def test_the_command_has_what_was_pinned(finished_run: Path) -> None:
    made = read_run(finished_run)
    for column, adapter in (("quantized", False), ("adapter", True)):
        command = server_command(made, column, "::1", 8090)
        assert json.loads(command[command.index("--chat-template-args") + 1]) == {
            "enable_thinking": False
        }
        assert command[command.index("--port") + 1] == "8090"
        assert ("--adapter-path" in command) is adapter
        assert "2025-01-01" in command
    thinking = {**made.recipe, "chat": {**made.recipe["chat"], "enable_thinking": True}}
    changed = type(made)(made.folder, made.record, thinking)
    assert '{"enable_thinking": true}' in server_command(changed, "quantized", "::1", 8090)


def test_a_column_that_is_not_there_is_a_message(finished_run: Path) -> None:
    (finished_run / "export" / "q5" / "model.safetensors").unlink()
    console = Console(io.StringIO())
    with pytest.raises(RunError, match="not whole"):
        list(serve(finished_run, column="quantized", host="127.0.0.1", port=1, console=console))


@pytest.mark.parametrize("says", ["", "ready"])
def test_a_model_that_never_comes_ends_it(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    """Whether it hangs while it loads or before it listens: a message, and nobody is left."""
    pid = tmp_path / "pid"
    code = (
        f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\n"
        f"print({says!r}, end='\\n' if {says!r} else '', flush=True); time.sleep(60)"
    )
    monkeypatch.setattr(
        module, "server_command", lambda *_: [sys.executable, "-I", "-S", "-c", code]
    )
    monkeypatch.setattr(module, "LOADING_SECONDS", 2.0)
    console, port = Console(io.StringIO()), free_port()
    with pytest.raises(RunError, match=r"cannot answer after 2\.00 s"):
        list(serve(finished_run, column="quantized", host="127.0.0.1", port=port, console=console))
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_model_that_cannot_be_loaded_ends_it(finished_run: Path) -> None:
    """Its config.json has the size that the manifest says, and nothing else of it."""
    config = finished_run / "export" / "q5" / "config.json"
    config.write_text("{" + " " * (config.stat().st_size - 2) + "}")
    said = io.StringIO()
    lines = serve(
        finished_run,
        column="quantized",
        host="127.0.0.1",
        port=free_port(),
        console=Console(said),
    )
    with pytest.raises(RunError, match="ended by itself"):
        list(lines)


def test_a_port_that_is_taken_is_a_message() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match="is in use") as caught:
            require_free_port("127.0.0.1", port)
        assert f"--port {port + 1}" in str(caught.value)
    require_free_port("127.0.0.1", port)
    with pytest.raises(RunError, match="cannot be used"):
        require_free_port("192.0.2.1", port)


def test_addresses_are_those_that_a_client_can_use() -> None:
    assert base_url("127.0.0.1", 8080) == "http://127.0.0.1:8080/v1"
    assert base_url("0.0.0.0", 80) == "http://127.0.0.1:80/v1"
    assert base_url("::1", 80) == base_url("::", 80) == "http://[::1]:80/v1"
    line = curl_line("http://x/v1")
    assert line.startswith("curl -s http://x/v1/chat/completions ") and '\'{"messages"' in line
