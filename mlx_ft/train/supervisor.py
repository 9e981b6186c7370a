"""Start, watch and restart the training process until its request is served.

Does: watch signs of life; restart from the last checkpoint after a death or a hang, and say why;
give up after deaths without progress. Does not: import MLX or train, which can kill a process.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault, Interrupted, RunError
from mlx_ft.system.console import Console
from mlx_ft.system.files import read_json
from mlx_ft.system.gpu_errors import Cause, known_cause, short_of_memory
from mlx_ft.text.safe import printable
from mlx_ft.train.checkpoint_list import CHECKPOINTS, complete_checkpoints
from mlx_ft.train.handoff import (
    RESULT_FILE,
    TrainRequest,
    read_error,
    read_heartbeat,
    write_request,
)
from mlx_ft.train.process import SEGMENT_OVER

PROCESS = "mlx_ft.train.process"
CONTROL_FOLDER = "train.control"
# Deaths in a row without a new checkpoint after which the supervisor gives up.
MAX_DEATHS_WITHOUT_PROGRESS = 3
# Silence after which a process is stuck: at least this long, and this many of its longest steps.
STUCK_SECONDS, STUCK_STEPS = 1800.0, 20
POLL_SECONDS = 0.2
LAST_LINES = 60
SMALLEST_MICRO_BATCH = 64


KILLED = short_of_memory("it was killed; when nobody did that, the system was out of memory")
STUCK = Cause("it gave no sign of life", "look at what else uses the machine")


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    code: exit code, or minus the signal's number.
    last_lines: its last lines on stderr.
    was_stuck: it gave no sign of life and was killed.
    """

    code: int
    last_lines: tuple[str, ...]
    was_stuck: bool = False


def cause_of(ending: Ending) -> Cause | None:
    """Return why a process died, None for a mistake in our own code."""
    if ending.was_stuck:
        return STUCK
    text = "\n".join(ending.last_lines)
    cause = known_cause(text)
    if cause is not None:
        return cause
    if ending.code == -signal.SIGKILL:
        return KILLED
    if ending.code < 0:
        name = signal.Signals(-ending.code).name
        return Cause(f"it ended with {name}", "its last words are above")
    return None


def last_checkpoint(request: TrainRequest) -> int:
    """Return the iteration of a training's newest whole checkpoint, 0 when there is none."""
    found = complete_checkpoints(request.folder / CHECKPOINTS, request.inputs)
    return int(found[-1].name) if found else 0


def _reached(request: TrainRequest) -> tuple[int, int]:
    """Return the number of complete seeds, and the newest checkpoint's iteration of the next one.

    Without several seeds, the checkpoint is that of the only training.
    """
    left = [seed for seed in request.seeds if request.trained(seed) is None]
    now = request.of_seed(left[0]) if left else request
    return len(request.seeds) - len(left), last_checkpoint(now)


def supervise(request: TrainRequest, run: Path, console: Console) -> dict[str, Any]:
    """Train in processes of their own until the request is served; return the manifest's info.

    Raises the training's own errors, Interrupted when it was stopped, RunError when processes die
    without progress.
    """
    control = run / CONTROL_FOLDER
    control.mkdir(parents=True, exist_ok=True)
    deaths = 0
    while True:
        before = _reached(request)
        write_request(control, request)
        try:
            ending = _run_child(control, console)
        except KeyboardInterrupt:
            raise read_error(control) or KeyboardInterrupt from None
        if ending.code == 0:
            info: dict[str, Any] = read_json(control / RESULT_FILE)
            shutil.rmtree(control)
            return info
        error = read_error(control)
        if error is not None:
            raise error
        if ending.code == SEGMENT_OVER:
            deaths = 0
            continue
        if ending.code == Interrupted.exit_code:
            raise KeyboardInterrupt
        cause = cause_of(ending)
        if cause is None:
            raise RuntimeError(f"the training process failed with code {ending.code}, see above")
        after = _reached(request)
        deaths, reached = 1 if after > before else deaths + 1, after[1]
        _require_progress(deaths, reached, cause)
        request = _with_less_memory(request, deaths, cause, console)
        console.say(
            f"the training process died: {cause.words}; going on from iteration {reached}",
            "yellow",
        )


def _require_progress(deaths: int, reached: int, cause: Cause) -> None:
    if deaths < MAX_DEATHS_WITHOUT_PROGRESS:
        return
    raise RunError(
        Fault(
            f"training, after iteration {reached}",
            f"the training process died {deaths} times without getting on: {cause.words}",
            f"{cause.fix}; {_what_is_left(reached, cause)}",
        )
    )


def _what_is_left(reached: int, cause: Cause) -> str:
    """Return where the same command continues, and which changes begin another run."""
    if not reached:
        return "no checkpoint was reached, a lower train.save_every writes one sooner"
    left = f"the same command goes on from iteration {reached}"
    other = ", but other values of these keys begin another run"
    return left + other if cause.another_run else left


def _with_less_memory(
    request: TrainRequest, deaths: int, cause: Cause, console: Console
) -> TrainRequest:
    """Return the request with half the tokens at a time, when memory was short twice in a row.

    After the first time a new process may suffice: its memory is not fragmented.
    """
    train = request.recipe.train
    tokens = train.micro_batch_tokens // 2
    if not cause.memory or deaths < 2 or tokens < SMALLEST_MICRO_BATCH:
        return request
    console.say(f"from now on {tokens} tokens at a time: less memory, the same sums", "yellow")
    fewer = train.model_copy(update={"micro_batch_tokens": tokens})
    return replace(request, recipe=request.recipe.model_copy(update={"train": fewer}))


def _run_child(control: Path, console: Console) -> Ending:
    """Run one process to its end; pass signals to this process on to it."""
    console_fd, owned = _console_fd(console)
    command = [sys.executable, "-m", PROCESS]
    process = subprocess.Popen(
        [*command, str(control), str(console_fd), str(os.getpid())],
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        pass_fds=(console_fd,),
        # Ctrl-C reaches this process alone, which then asks the child, once, to stop.
        start_new_session=True,
    )
    lines: deque[str] = deque(maxlen=LAST_LINES)
    reader = threading.Thread(target=_forward, args=(process, lines, console), daemon=True)
    reader.start()
    try:
        was_stuck = _wait(process, control)
    except BaseException:
        _stop(process)
        raise
    finally:
        reader.join(timeout=5)
        if owned:
            os.close(console_fd)
    return Ending(process.returncode, tuple(lines), was_stuck)


def _console_fd(console: Console) -> tuple[int, bool]:
    """Return a descriptor of the console's stream, and whether it is ours to close.

    A stream without one (in memory) gets its lines by way of the process's stderr.
    """
    try:
        return os.dup(console.fileno()), True
    except (OSError, io.UnsupportedOperation):
        return 2, False


def _forward(process: subprocess.Popen[bytes], lines: deque[str], console: Console) -> None:
    assert process.stderr is not None
    with process.stderr as stream:
        for raw in stream:
            line = raw.decode(errors="replace").rstrip("\n")
            lines.append(line)
            console.say(printable(line))


def _wait(process: subprocess.Popen[bytes], control: Path) -> bool:
    """Wait for the end; kill a process that is silent for too long; return whether it was."""
    beats, since = -1, time.monotonic()
    while True:
        try:
            process.wait(timeout=POLL_SECONDS)
            return False
        except subprocess.TimeoutExpired:
            pass
        heartbeat = read_heartbeat(control)
        now = time.monotonic()
        if heartbeat is not None and heartbeat.beats != beats:
            beats, since = heartbeat.beats, now
        longest = heartbeat.longest_seconds if heartbeat is not None else 0.0
        if now - since > max(STUCK_SECONDS, STUCK_STEPS * longest):
            process.kill()
            process.wait()
            return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Pass an interruption on, and wait until the process has written its checkpoint."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait()
    except KeyboardInterrupt:  # asked for a second time: at once
        process.kill()
        process.wait()
        raise
