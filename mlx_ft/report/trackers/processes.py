"""Run each tracker in its own process, so that a failing tracker cannot affect the run.

Does: start them, warn once when one fails or hangs, and give them time to finish at the end.
Does not: know any tracker, or pass data on. They follow the run folder themselves, so they do not
notice restarts of the training process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_ft.report.trackers.follow import read_memory
from mlx_ft.report.trackers.services import KINDS
from mlx_ft.system.console import Console

# For all trackers together, once the run itself is over.
FINISH_SECONDS = 60.0
DEFAULT_PROJECT = "mlx-ft"
STORES = "trackers"  # beside the run folders: one store for all runs


def store_of(run: Path, name: str) -> Path:
    """Return a tracker's folder for data that stays on this machine, for all runs."""
    return (run.parent / STORES / name).resolve()


@contextmanager
def tracked(
    run: Path,
    names: Sequence[str],
    project: str | None,
    console: Console,
    patience_seconds: float = FINISH_SECONDS,
) -> Iterator[None]:
    """Have the trackers `names` follow a run inside the block. Their failures raise nothing."""
    processes = {name: _start(run, name, project or DEFAULT_PROJECT, console) for name in names}
    over = threading.Event()
    started = {name: process for name, process in processes.items() if process is not None}
    for name, process in started.items():
        watcher = threading.Thread(
            target=_warn_of_its_end, args=(process, run, name, console, over), daemon=True
        )
        watcher.start()
    try:
        yield
    finally:
        over.set()
        _finish(started, run, console, patience_seconds)


def _start(run: Path, name: str, project: str, console: Console) -> subprocess.Popen[bytes] | None:
    store = store_of(run, name)
    command = [
        sys.executable,
        "-m",
        "mlx_ft.report.trackers.follow",
        name,
        str(run.resolve()),
        str(store),
    ]
    try:
        process = subprocess.Popen(
            [*command, project],
            stdin=subprocess.PIPE,
            # A tracker's own words may hold anything, a key too.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        console.say(f"{name} is not told of this run: {error.strerror}", "yellow")
        return None
    console.say(f"{name} follows this run: {KINDS[name].look.format(store=store)}")
    return process


def _warn_of_its_end(
    process: subprocess.Popen[bytes],
    run: Path,
    name: str,
    console: Console,
    over: threading.Event,
) -> None:
    """Say it at once when a tracker gives up while the run goes on."""
    process.wait()
    if not over.is_set():
        reason = _reason(process, run, name)
        console.say(f"{name} stopped following ({reason}); the run goes on", "yellow")


def _reason(process: subprocess.Popen[bytes], run: Path, name: str) -> str:
    return str(read_memory(run, name).get("error") or f"exit code {process.returncode}")


def _finish(
    processes: dict[str, subprocess.Popen[bytes]], run: Path, console: Console, patience: float
) -> None:
    """Let trackers finish, for `patience` seconds in all; then stop them."""
    until = time.monotonic() + patience
    running = {name: process for name, process in processes.items() if process.poll() is None}
    for process in processes.values():
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
    for name, process in running.items():
        try:
            process.wait(timeout=max(0.1, until - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            _kill(process)
            console.say(
                f"{name} had not taken everything after {patience:.0f} s and was ended", "yellow"
            )
            continue
        if process.returncode:
            console.say(f"{name} has not got everything: {_reason(process, run, name)}", "yellow")


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
