"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal): now, or at the next safe point.

Does: turn SIGTERM and SIGHUP into KeyboardInterrupt. For work that can stop cleanly, hold the first
signal back and let the work ask for it; a second signal ends the work, unless it is SIGHUP. Does
not: take a SIGHUP that is ignored already (nohup).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mlx_ft.system.console import Console

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; embedding programs keep their own
        return
    asked = threading.Event()

    def taken(number: int, frame: FrameType | None) -> None:
        again = asked.is_set()
        asked.set()
        if number == signal.SIGHUP:
            # A terminal that closes sends it twice, by its shell and by the system, and perhaps
            # after a Ctrl-C: none of that is a user who cannot wait.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            if again:
                return
        handler(number, frame)

    wanted = [number for number in SIGNALS if not _let_be(number)]
    before = {number: signal.signal(number, taken) for number in wanted}
    try:
        yield
    finally:
        for number, old in before.items():
            if not _let_be(number):
                signal.signal(number, old)


def _let_be(number: signal.Signals) -> bool:
    """Return whether a hang-up is ignored already: by nohup, or since the terminal is gone."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt."""
    with _handling(_interrupt):
        yield


@contextmanager
def deferred(console: Console) -> Iterator[Callable[[], bool]]:
    """Within, the first signal makes the yielded function return True; a second one interrupts."""
    requested = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        console.say(
            "stopping at the next step, a checkpoint is written first (again to stop at once)"
        )

    with _handling(handler):
        yield requested.is_set
