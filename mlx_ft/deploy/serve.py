"""`mlx-ft serve`: serve a run's model to OpenAI clients, with mlx-lm's server in its own process.

Does: start the server on the model's folder with its template settings, wait until it can answer,
pass on its narration, end it.
Does not: answer HTTP requests or load the model (`server_process.py` does).
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mlx_ft.errors import Fault, Interrupted, RunError
from mlx_ft.runs.models import RunModels, column_folders, read_run
from mlx_ft.system.console import Console
from mlx_ft.system.signals import interruptible
from mlx_ft.text.quantities import format_seconds

READY = "ready"
POLL_SECONDS = 0.1
ENDING_SECONDS = 5.0
# Enough for 100 GB from a disk that reads 60 MB a second.
LOADING_SECONDS = 1800.0
# A warning that this module replaces with its own.
SILENCED = "ignore:mlx_lm.server is not recommended"


def server_command(made: RunModels, column: str, host: str, port: int) -> list[str]:
    """Return the command of the server's process.

    The run's name, the pinned date and the parent's process id come before mlx-lm's options.
    """
    model, adapter = column_folders(made, column)
    command = [sys.executable, "-W", SILENCED, "-m", "mlx_ft.deploy.server_process"]
    command += [made.name, made.date, str(os.getpid()), "--model", str(model)]
    if adapter is not None:
        command += ["--adapter-path", str(adapter)]
    thinking = json.dumps({"enable_thinking": made.enable_thinking})
    command += ["--chat-template-args", thinking, "--host", host, "--port", str(port)]
    return [*command, "--log-level", "WARNING"]


def base_url(host: str, port: int) -> str:
    """Return the URL for clients on this machine."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{port}/v1"


def curl_line(url: str) -> str:
    """Return a command line that sends the server a request."""
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})
    header = "Content-Type: application/json"
    return shlex.join(["curl", "-s", f"{url}/chat/completions", "-H", header, "-d", body])


def require_free_port(host: str, port: int) -> None:
    """Raise RunError when the address cannot be listened on."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            fault = Fault(f"port {port}", "is in use", f"choose another, such as --port {port + 1}")
        else:
            fault = Fault(f"{host}, port {port}", f"cannot be used ({error})", "change --host")
        raise RunError(fault) from error


def serve(run: Path, *, column: str, host: str, port: int, console: Console) -> Iterator[str]:
    """Serve a column's model until interrupted; yield result lines once it can answer.

    Raises RunError when it cannot be served, takes too long or ends by itself, Interrupted on
    Ctrl-C or SIGTERM.
    """
    made = read_run(run)
    command = server_command(made, column, host, port)
    require_free_port(host, port)
    if not _is_loopback(host):
        console.say("others on the network can use it: it asks nobody for a password", "yellow")
    console.say(f"loading {made.name}, {column}")
    with interruptible():
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Ctrl-C reaches this process alone, which then ends the server.
            start_new_session=True,
        )
        url = base_url(host, port)
        try:
            _forward(process, console)
            _wait_until_ready(process, url)
            yield f"url      {url}"
            yield f"model    {made.name} (any other name is answered by it too)"
            yield f"next     {curl_line(url)}"
            console.say("serving; Ctrl-C ends it")
            process.wait()
        except KeyboardInterrupt:
            again = "give the same command again to serve it"
            raise Interrupted(Fault(url, "no longer served", again)) from None
        finally:
            _end(process)
    raise _ended(process)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _forward(process: subprocess.Popen[bytes], console: Console) -> None:
    """Narrate the stderr lines of the process until it ends."""

    def pass_on(stream: IO[bytes]) -> None:
        with stream:
            for raw in stream:
                console.say(raw.decode(errors="replace").rstrip("\n"))

    assert process.stderr is not None
    threading.Thread(target=pass_on, args=(process.stderr,), daemon=True).start()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    """Wait until the model is loaded and the server listens.

    Raises RunError when it ends before, or takes longer than LOADING_SECONDS.
    """
    deadline = time.monotonic() + LOADING_SECONDS
    assert process.stdout is not None
    stdout, lines = process.stdout, queue.Queue[bytes]()

    def listen() -> None:
        with stdout:
            lines.put(stdout.readline())
            stdout.read()  # a full pipe would block the process

    threading.Thread(target=listen, daemon=True).start()
    line: bytes | None = None
    while line is None:
        try:
            # A wait without a timeout cannot be interrupted on every platform.
            line = lines.get(timeout=POLL_SECONDS)
        except queue.Empty:
            _require_time(deadline)
    if line.decode(errors="replace").strip() != READY:
        process.wait()
        raise _ended(process)
    health = f"{url.removesuffix('/v1')}/health"
    while process.poll() is None:
        try:
            with urllib.request.urlopen(health, timeout=ENDING_SECONDS):
                return
        except (urllib.error.URLError, OSError):
            _require_time(deadline)
            time.sleep(POLL_SECONDS)
    raise _ended(process)


def _require_time(deadline: float) -> None:
    """Raise RunError when the monotonic clock is past `deadline`."""
    if time.monotonic() > deadline:
        found = f"cannot answer after {format_seconds(LOADING_SECONDS)}"
        fix = "free memory, or read what it says above, and try again"
        raise RunError(Fault("the server", found, fix))


def _ended(process: subprocess.Popen[bytes]) -> RunError:
    found = f"ended by itself (exit code {process.returncode})"
    return RunError(Fault("the server", found, "read what it says above"))


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=ENDING_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
