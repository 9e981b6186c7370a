"""`mlx-ft watch`: follow a run of another process until it ends.

Does: read the files that the run writes, draw them on a terminal or print each new line elsewhere.
Does not: touch the run. Ctrl-C ends only the watching.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from mlx_ft.report.live import answer_lines, metric_line, picture
from mlx_ft.runs.metrics import Metrics, last_answers
from mlx_ft.runs.reader import ArtifactReader
from mlx_ft.runs.state import RunState, state_of
from mlx_ft.text.safe import printable

POLL_SECONDS = 1.0
# How often a watcher without a terminal repeats what a run is at, when nothing is measured.
SAID_SECONDS = 30.0
SUCCESS = ("finished", "stopped")


def watch(run: Path, stream: TextIO, sleep: Callable[[float], None] = time.sleep) -> int:
    """Show a run on `stream` until it ends. Return 0 if it ended well, else 1.

    Raises RunError if `run` holds no run, KeyboardInterrupt if the watcher is stopped.
    """
    ArtifactReader(run)
    console = RichConsole(file=stream, highlight=False, emoji=False, markup=False)
    state = _draw(run, console, sleep) if console.is_terminal else _log(run, stream, sleep)
    return 0 if state.name in SUCCESS else 1


def _draw(run: Path, console: RichConsole, sleep: Callable[[float], None]) -> RunState:
    metrics = Metrics(run)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            state = state_of(run)
            shown = picture(
                run.name, state.words, metrics.refresh(), last_answers(run), console.width - 1
            )
            live.update(Text(printable("\n".join(shown))), refresh=True)
            if state.name != "running":
                return state
            sleep(POLL_SECONDS)


def _log(run: Path, stream: TextIO, sleep: Callable[[float], None]) -> RunState:
    """Print every new measurement as a line, and at times the state of the run."""
    metrics = Metrics(run)
    printed: set[tuple[Any, ...]] = set()
    said, said_at = "", float("-inf")
    while True:
        state = state_of(run)
        fresh = _fresh(metrics, printed)
        for line in fresh:
            _print(stream, metric_line(line))
        words = state.words.partition(",")[0]
        due = time.monotonic() - said_at > SAID_SECONDS
        if state.name != "running" or words != said or (due and not fresh):
            _print(stream, f"{run.name}: {state.words}")
            said, said_at = words, time.monotonic()
        if state.name != "running":
            for answer in last_answers(run)[-1:]:
                for text in answer_lines(answer):
                    _print(stream, text)
            return state
        sleep(POLL_SECONDS)


def _fresh(metrics: Metrics, printed: set[tuple[Any, ...]]) -> list[Mapping[str, Any]]:
    """Return lines that were not printed yet.

    Measurements that a resumed run repeats are not new, nor are those of the best of several seeds.
    """
    found: list[Mapping[str, Any]] = []
    lines = metrics.refresh()
    if metrics.seed is None and any(seed is not None for seed, *_ in printed):
        return found
    for line in lines:
        key = (metrics.seed, line.get("kind"), line.get("iteration"))
        if key not in printed:
            printed.add(key)
            found.append(line)
    return found


def _print(stream: TextIO, text: str) -> None:
    stream.write(f"{printable(text)}\n")
    stream.flush()


def next_line(run: Path) -> str:
    """Return the line with the next step after watching."""
    state = state_of(run)
    verb = "watch" if state.name == "running" else "show"
    return f"next     mlx-ft {verb} {shlex.quote(str(run))}"
