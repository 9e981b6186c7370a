"""A server is asked the same messages; what may pass is tried again, the rest is a message."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlx_ft.engine.load import load_model
from mlx_ft.errors import DataError, ModelError
from mlx_ft.evaluate.column import Answer, Question
from mlx_ft.evaluate.endpoint import Endpoint, server_column
from mlx_ft.evaluate.harness import evaluate
from mlx_ft.evaluate.scorers.text import Perplexity
from mlx_ft.model.chat import ChatFormat
from tests.support.harnesses import QUESTIONS, column_of, make_suite
from tests.support.models import write_tiny_model
from tests.support.narration import SeenProgress
from tests.support.ports import free_port

Reply = tuple[int, Any, dict[str, str]]
QUESTION = Question([{"role": "user", "content": "hello"}], None, None, 8, ("<think>",))


def said(text: str | None, **message: Any) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"completion_tokens": 3}}


@contextlib.contextmanager
def stub(reply: Callable[[dict[str, Any], int], Reply]) -> Iterator[tuple[str, list[Any]]]:
    """Yield the URL of a server that answers by a rule, and the requests it gets."""
    seen: list[Any] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((self.path, dict(self.headers), body))
                number = len(seen)
            status, value, headers = reply(body, number)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in headers.items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def endpoint(url: str, **changes: Any) -> Endpoint:
    options = {"concurrency": 2, "backoff_seconds": (0.01, 0.02), **changes}
    return Endpoint(url, "m", enable_thinking=False, **options)


def test_a_request_has_messages_and_is_greedy() -> None:
    with stub(lambda body, number: (200, said("hi"), {})) as (url, seen):
        answer = endpoint(url, key="secret-key").ask(QUESTION)
    assert answer == Answer("hi", "hi", None, "stop", 3)
    ((path, headers, body),) = seen
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret-key"
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 8,
        "temperature": 0,
        "stream": False,
        "stop": ["<think>"],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert "secret" not in repr(endpoint(url, key="secret-key"))


def test_what_passes_is_tried_again() -> None:
    replies = [(503, b"busy", {}), (429, b"slow down", {"Retry-After": "0.01"})]
    with stub(lambda _, number: [*replies, (200, said("hi"), {})][number - 1]) as (url, seen):
        assert endpoint(url).ask(QUESTION).text == "hi"
        assert len(seen) == 3
    with stub(lambda *_: (500, b"broken for good", {})) as (url, seen):
        with pytest.raises(ModelError, match=r"status 500 \(broken for good\)"):
            endpoint(url).ask(QUESTION)
        assert len(seen) == 3


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ((401, b"no key", {}), "--server-key-env"),
        ((404, {"error": "no such model"}, {}), "--server-model"),
        ((400, b"too \x1b[31m long", {}), "status 400"),
        ((302, b"", {"Location": "http://127.0.0.1:1/"}), "status 302"),
        ((200, b"<html>", {}), "not JSON"),
        ((200, {"choices": []}, {}), "no readable answer"),
        ((200, said(None, tool_calls=[{"function": {"arguments": "{"}}]), {}), "no readable"),
        ((200, [1], {}), "no readable answer"),
    ],
)
def test_what_does_not_pass_is_a_message_at_once(reply: Reply, told: str) -> None:
    with stub(lambda *_: reply) as (url, seen):
        with pytest.raises(ModelError, match=told):
            endpoint(url).ask(QUESTION)
        assert len(seen) == 1


def test_a_server_that_is_not_there_is_a_message() -> None:
    with pytest.raises(ModelError, match="cannot be reached") as caught:
        endpoint(f"http://127.0.0.1:{free_port()}/v1").ask(QUESTION)
    assert "what was answered is kept" in str(caught.value)
    for url in ("ftp://x/v1", "nonsense", "http://user:secret@x/v1"):
        with pytest.raises(ModelError) as refused:
            server_column(endpoint(url))
        assert "secret" not in str(refused.value)


def test_a_server_that_knows_no_thinking_switch_is_asked_without() -> None:
    def reply(body: dict[str, Any], number: int) -> Reply:
        if "chat_template_kwargs" in body:
            return 400, b"unknown argument chat_template_kwargs", {}
        return 200, said("hi"), {}

    with stub(reply) as (url, seen):
        assert endpoint(url).ask(QUESTION).text == "hi" and len(seen) == 2


def test_calls_and_thinking_that_a_server_took_out_are_put_back() -> None:
    call = {"function": {"name": "lint", "arguments": '{"path": "ü"}'}}
    with stub(lambda *_: (200, said(None, tool_calls=[call], reasoning="hm"), {})) as (url, _):
        text = endpoint(url).ask(QUESTION).text
    assert text == (
        '<think>hm</think><tool_call>\n{"name": "lint", "arguments": {"path": "ü"}}\n</tool_call>'
    )


def test_several_are_asked_at_a_time_and_a_failure_keeps_what_was_answered(tmp_path: Path) -> None:
    """Five questions, four places: the fifth is refused, the others are in the file."""
    together = threading.Barrier(4, timeout=20)

    def reply(body: dict[str, Any], number: int) -> Reply:
        if body["messages"][0]["content"] == QUESTIONS[4]:
            time.sleep(0.3)
            return 400, b"no", {}
        together.wait()
        return 200, said("I am fine"), {}

    suite = make_suite()
    with stub(reply) as (url, seen):
        column = server_column(endpoint(url, concurrency=4))
        with pytest.raises(ModelError):
            evaluate([suite], [column], tmp_path, progress=SeenProgress())
    lines = (tmp_path / "chat" / "server--m.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4
    with stub(lambda *_: (200, said("I am fine"), {})) as (url, seen):
        results = evaluate(
            [suite], [server_column(endpoint(url))], tmp_path, progress=SeenProgress()
        )
    assert len(seen) == 5, "another address is another model"
    assert results["suites"]["chat"]["server--m"]["mean"] == 1.0
    assert results["columns"]["server--m"]["template"] == "unknown"
    assert "could not be compared" in results["warnings"][0]


def test_a_loss_of_references_is_not_to_be_had(tmp_path: Path) -> None:
    target = {"reference": "Paris", "max_perplexity": 4.0}
    samples = tuple(replace(sample, target=target) for sample in make_suite().samples)
    suite = make_suite(scorer=Perplexity(), samples=samples)
    column = server_column(endpoint("http://127.0.0.1:1/v1"))
    with pytest.raises(DataError, match="does not tell the loss"):
        evaluate([suite], [column], tmp_path, progress=SeenProgress())


@contextlib.contextmanager
def mlx_lm_server(folder: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "mlx_lm.server", "--model", str(folder)]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def test_a_real_server_says_what_the_model_says(tmp_path: Path) -> None:
    """mlx-lm's server on a model, and the same model in memory: the same lines but for the keys."""
    folder = write_tiny_model(tmp_path / "model", bits=None)
    loaded = load_model(folder, ChatFormat())
    suite = make_suite(stop=())
    with mlx_lm_server(folder) as url:
        server = server_column(Endpoint(url, str(folder), enable_thinking=False, concurrency=3))
        column = column_of(loaded, "model")
        evaluate([suite], [column, server], tmp_path / "eval", progress=SeenProgress())
    texts = [
        [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted((tmp_path / "eval" / "chat").iterdir())
    ]
    assert len(texts) == 2 and len(texts[0]) == len(QUESTIONS) and texts[0] == texts[1]
