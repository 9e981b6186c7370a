"""mlx-lm's own commands and the openai client take the exported folder as it is, and say what the
evaluation heard.

Run by `make test-clients`. Neither command knows of mlx-ft.
"""

import os
import re
import shlex
import shutil
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

from mlx_ft.system.files import read_json_lines

pytestmark = pytest.mark.clients

MAX_TOKENS = 12
LOADING_SECONDS = 300
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(finished_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 5-bit folder of a run, away from everything else that the run knows."""
    (found,) = finished_once.glob("runs/*/export/q5")
    return Path(shutil.copytree(found, tmp_path_factory.mktemp("taken") / "model"))


@pytest.fixture(scope="module")
def heard(finished_once: Path) -> dict[str, str]:
    """What the evaluation asked the 5-bit model, and what it heard."""
    (file,) = finished_once.glob("runs/*/eval/small/quantized.jsonl")
    rows = read_json_lines(file)
    assert rows and all(row["generated_tokens"] <= MAX_TOKENS for row in rows)
    found = {row["messages"][-1]["content"]: row["text"] for row in rows}
    assert any(found.values()), "an empty answer would be equal to nothing at all"
    return found


def option(folder: Path, name: str) -> list[str]:
    """Return an option of mlx-lm as the folder's README gives it."""
    readme = (folder / "README.md").read_text("utf-8")
    given = re.search(rf"`({name} '.*?')`", readme)
    assert given is not None, readme
    return shlex.split(given[1])


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mlx_lm", *arguments]


def test_generate_says_what_the_evaluation_heard(folder: Path, heard: dict[str, str]) -> None:
    mode = option(folder, "--chat-template-config")
    for question, answer in heard.items():
        asked = ("--prompt", question, "--max-tokens", str(MAX_TOKENS), "--temp", "0")
        said = subprocess.run(
            command("generate", "--model", str(folder), *asked, "--verbose", "False", *mode),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LOADING_SECONDS,
            env=os.environ | OFFLINE,
        )
        assert said.returncode == 0, said.stderr
        assert said.stdout.strip() == answer.strip()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Yield the address of mlx-lm's server once it can answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    mode = option(folder, "--chat-template-args")
    url, log = f"http://127.0.0.1:{port}", folder.parent / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command("server", "--model", str(folder), "--port", port, *mode),
            stdout=stream,
            stderr=stream,
            env=os.environ | OFFLINE,
        )
        try:
            wait_for(f"{url}/health", process, log)
            yield f"{url}/v1"
        finally:
            process.kill()
            process.wait()


def wait_for(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + LOADING_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"nobody answers: {log.read_text()[-2000:]}")


def test_the_openai_client_hears_what_the_evaluation_heard(
    folder: Path, heard: dict[str, str]
) -> None:
    openai: Any = pytest.importorskip("openai", reason="no openai client: pip install openai")
    with served(folder) as url, openai.OpenAI(base_url=url, api_key="none") as client:
        for question, answer in heard.items():
            reply = client.chat.completions.create(
                model=str(folder),
                messages=[{"role": "user", "content": question}],
                max_tokens=MAX_TOKENS,
                temperature=0.0,
            )
            assert reply.choices[0].message.content.strip() == answer.strip()
