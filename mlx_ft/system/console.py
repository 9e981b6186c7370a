"""Narration and progress bars on stderr.

Does: print lines; show a live bar on a terminal and occasional lines in a log file; replace control
characters in text from a model; continue when the reader closes the stream.
Does not: print results (those go to stdout).
"""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TextIO, cast

from rich.console import Console as RichConsole
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from mlx_ft.text.quantities import format_seconds
from mlx_ft.text.safe import printable

LOG_EVERY_SECONDS = 15.0
# What a pipe (`| head`) and a terminal that was closed say to those who write.
READER_GONE = (errno.EPIPE, errno.EIO)


def colored(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that colour is wanted on (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


class _Lasting:
    """A text stream that keeps accepting writes after its reader has gone.

    Has only the methods that rich and `ProgressLine` use.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        with self._whoever_reads():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._whoever_reads():
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @contextmanager
    def _whoever_reads(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in READER_GONE:
                raise
            # The stream keeps what it could not write: with another end for it, that and all that
            # follows is taken, and Python's last flush does not turn success into exit code 120.
            with suppress(io.UnsupportedOperation):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


class Progress(Protocol):
    """Progress of one piece of work, as the code that does the work sees it."""

    def update(self, done: float, text: str = "") -> None:
        """Show that `done` of the total is done."""
        ...


class ProgressLine:
    """Progress of one piece of work, as a bar or as occasional lines."""

    def __init__(self, title: str, total: float, stream: TextIO, bar: RichProgress | None) -> None:
        self._title = title
        self._total = max(total, 1e-9)
        self._stream = stream
        self._bar = bar
        self._task: TaskID | None = bar.add_task(title, total=self._total, text="") if bar else None
        self._started = time.monotonic()
        self._logged = self._started
        self._first_done: float | None = None
        self._last_done = 0.0

    def seconds_left(self, done: float) -> float | None:
        """Return the estimated time left from the pace since the first update, or None at the
        first.

        `done` at the first update is the starting point, so that a resumed run estimates right. If
        `done` falls back, another piece of work has begun, and this is the new starting point.
        """
        if self._first_done is None or done <= self._first_done:
            return None
        pace = (time.monotonic() - self._started) / (done - self._first_done)
        return pace * max(0.0, self._total - done)

    def update(self, done: float, text: str = "") -> None:
        """Show that `done` of the total is done."""
        now = time.monotonic()
        if self._first_done is None or done < self._last_done:
            self._first_done, self._started = done, now
        self._last_done = done
        left = self.seconds_left(done)
        left_text = "" if left is None else f", {format_seconds(left)} left"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, text=f"{text}{left_text}")
        elif now - self._logged >= LOG_EVERY_SECONDS:
            self._logged = now
            share = 100 * done / self._total
            details = f" {text}" if text else ""
            self._stream.write(f"{self._title} {share:.0f} %{details}{left_text}\n")
            self._stream.flush()


class Console:
    """Narration of one command, on `stream` (stderr by default)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = cast(TextIO, _Lasting(sys.stderr if stream is None else stream))
        # rich honours NO_COLOR and falls back to plain text in pipes.
        self._rich = RichConsole(
            file=self._stream, highlight=False, soft_wrap=True, emoji=False, markup=False
        )

    def fileno(self) -> int:
        """Return the stream's file descriptor. Raises io.UnsupportedOperation if it has none."""
        return self._stream.fileno()

    def say(self, text: str, style: str | None = None) -> None:
        """Print text as one line or several. Control characters are replaced."""
        self._rich.print(printable(text), style=style)

    def heading(self, text: str) -> None:
        """Print the name of the next stage."""
        self.say(text, style="bold")

    @contextmanager
    def progress(self, title: str, total: float) -> Iterator[Progress]:
        """Yield a progress line; a bar on a terminal, rare plain lines elsewhere."""
        if not self._rich.is_terminal:
            yield ProgressLine(title, total, self._stream, None)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} % {task.fields[text]}"),
        )
        with RichProgress(*columns, console=self._rich, transient=True) as bar:
            yield ProgressLine(title, total, self._stream, bar)
