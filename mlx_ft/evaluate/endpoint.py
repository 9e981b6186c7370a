"""An OpenAI-compatible server as a column.

Does: send messages, several at a time, greedily. Retry failures that may pass, and explain others.
Does not: keep or print the key, follow a proxy to this machine, or send a prompt as a string. The
server's own template renders, so it cannot be compared with any training.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlx_ft.errors import Fault, ModelError
from mlx_ft.evaluate.column import Answer, Column, OnDone, Question
from mlx_ft.evaluate.signs import THINKING_TAGS
from mlx_ft.system.files import hash_of

TIMEOUT_SECONDS = 600.0
# Waits before the further attempts: half a minute in all.
BACKOFF_SECONDS = (0.5, 2.0, 8.0, 20.0)
MAX_WAIT_SECONDS = 60.0
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
MAX_SHOWN_CHARACTERS = 300
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Endpoint:
    """A server, and how it is asked.

    url: up to and with /v1.
    model: which of its models.
    concurrency: how many questions at a time.
    key: goes with each request where it is given; it is never part of a result.
    """

    url: str
    model: str
    enable_thinking: bool
    concurrency: int
    key: str | None = None
    backoff_seconds: tuple[float, ...] = BACKOFF_SECONDS
    timeout_seconds: float = TIMEOUT_SECONDS

    def __repr__(self) -> str:
        return f"Endpoint({self.url}, {self.model})"

    def answer(self, questions: Sequence[Question], on_done: OnDone) -> None:
        """Answer questions, `concurrency` at a time. Raises ModelError when one cannot be."""
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Answer | BaseException]] = queue.SimpleQueue()
        over = threading.Event()
        for index in range(len(questions)):
            todo.put(index)

        def work() -> None:
            while not over.is_set():
                try:
                    index = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((index, self.ask(questions[index])))
                except BaseException as error:
                    # It is raised again where somebody waits for this answer.
                    done.put((index, error))
                    return

        # Daemons: what is in flight when somebody stops is not waited for.
        for _ in range(min(self.concurrency, len(questions))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in questions:
                index, said = _wait(done)
                if isinstance(said, BaseException):
                    raise said
                on_done(index, said)
        finally:
            over.set()

    def ask(self, question: Question) -> Answer:
        """Return the answer to one question. Raises ModelError when there is none to be had."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in question.messages],
            "max_tokens": question.max_tokens,
            "temperature": 0,
            "stream": False,
        }
        if question.tools:
            body["tools"] = [dict(tool) for tool in question.tools]
        if question.stop:
            body["stop"] = list(question.stop)
        thinking = {"chat_template_kwargs": {"enable_thinking": self.enable_thinking}}
        try:
            reply = self._post({**body, **thinking})
        except _Refused as refused:
            # What not every server knows is left out where it is the reason.
            if refused.status not in (400, 422) or "chat_template_kwargs" not in refused.words:
                raise ModelError(self._fault(refused.status, refused.words)) from refused
            try:
                reply = self._post(body)
            except _Refused as again:
                raise ModelError(self._fault(again.status, again.words)) from again
        return self._read(reply)

    def _post(self, body: Mapping[str, Any]) -> Any:
        """Return the reply to a request, after as many attempts as it takes and is worth."""
        headers = {"Content-Type": "application/json", "User-Agent": "mlx-ft"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = json.dumps(body).encode()
        for wait in (*self.backoff_seconds, None):
            request = urllib.request.Request(
                f"{self.url}/chat/completions", data, headers, method="POST"
            )
            try:
                with self._opener().open(request, timeout=self.timeout_seconds) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                words = error.read(4096).decode(errors="replace")
                if error.code not in PASSING or wait is None:
                    raise _Refused(error.code, words) from error
                wait = _asked_to_wait(error.headers.get("Retry-After"), wait)
            except ValueError as error:
                found = "its reply is not JSON"
                fix = "give the URL of an OpenAI-compatible server, up to /v1"
                raise ModelError(Fault(self.url, found, fix)) from error
            except OSError as error:  # refused, reset, timed out, no such host
                if wait is None:
                    reason = getattr(error, "reason", error)
                    fix = "start the server, or correct --server; what was answered is kept"
                    raise ModelError(
                        Fault(self.url, f"cannot be reached ({reason})", fix)
                    ) from error
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _opener(self) -> urllib.request.OpenerDirector:
        host = urllib.parse.urlsplit(self.url).hostname or ""
        here = host in ("localhost", "::1") or host.startswith("127.")
        return urllib.request.build_opener(
            *([urllib.request.ProxyHandler({})] if here else []), _NoRedirect()
        )

    def _fault(self, status: int, words: str) -> Fault:
        shown = " ".join(words.split())[:MAX_SHOWN_CHARACTERS]
        fix = {
            401: "name the variable that holds its key: --server-key-env NAME",
            403: "name the variable that holds its key: --server-key-env NAME",
            404: "check --server (it ends in /v1) and --server-model",
        }.get(status, "see the server's own log; what was answered is kept")
        return Fault(self.url, f"answers with status {status} ({shown})", fix)

    def _read(self, reply: Any) -> Answer:
        try:
            choice = reply["choices"][0]
            message = choice["message"]
            content = str(message.get("content") or "")
            thought = message.get("reasoning") or message.get("reasoning_content")
            calls = [_call(call["function"]) for call in message.get("tool_calls") or ()]
            tokens = int((reply.get("usage") or {}).get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            fix = "give the URL of an OpenAI-compatible server, up to /v1"
            found = f"its reply has no readable answer ({type(error).__name__})"
            raise ModelError(Fault(self.url, found, fix)) from error
        text = "\n".join([*filter(None, [content]), *calls])
        if thought:
            text = f"{THINKING_TAGS[0]}{thought}{THINKING_TAGS[1]}{text}"
        ended = str(choice.get("finish_reason") or "stop")
        return Answer(text, text, None, ended, tokens)


class _Refused(Exception):
    """An HTTP status that another attempt would not change, and the server's words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(status, words)
        self.status, self.words = status, words


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET, and take the key elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _wait(done: queue.SimpleQueue[Any]) -> Any:
    while True:
        try:
            # A wait without an end could not be interrupted everywhere.
            return done.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue


def _asked_to_wait(header: str | None, otherwise: float) -> float:
    try:
        seconds = float(header or otherwise)
    except ValueError:
        return otherwise
    return min(max(seconds, otherwise), MAX_WAIT_SECONDS) if math.isfinite(seconds) else otherwise


def _call(function: Mapping[str, Any]) -> str:
    """Return a call that a server has parsed, in the words that models trained on calls use."""
    arguments = function.get("arguments") or "{}"
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    written = json.dumps({"name": function["name"], "arguments": value}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


@contextmanager
def _opened(endpoint: Endpoint) -> Iterator[Endpoint]:
    yield endpoint


def server_column(endpoint: Endpoint) -> Column:
    """Return the column of a server's model. Raises ModelError unless the URL is http or https."""
    parts = urllib.parse.urlsplit(endpoint.url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        fix = "give it as http://127.0.0.1:8080/v1; a key goes into --server-key-env"
        raise ModelError(Fault("--server", "is no http or https URL without a user", fix))
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in endpoint.model)
    return Column(
        name=f"server--{name}"[:80],
        # Whatever answers there: a server does not say which weights it has.
        sha256=hash_of(["server", endpoint.url, endpoint.model]),
        renderer=None,
        open=partial(_opened, endpoint),
        enable_thinking=endpoint.enable_thinking,
        facts={"server": endpoint.url, "model": endpoint.model},
    )
