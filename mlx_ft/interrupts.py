"""Ctrl-C and SIGTERM, either at once or at the next safe moment.

Does: turn SIGTERM into KeyboardInterrupt, and for work that can stop cleanly, hold the first signal
back and let the work ask for it; a second signal always ends it. Does not: decide what is kept.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; embedding programs keep their own
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, SIGINT and SIGTERM both raise KeyboardInterrupt."""
    with _handling(_interrupt):
        yield


@contextmanager
def deferred(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Within, the first signal only makes the yielded function return True; the second
    interrupts.
    """
    requested = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        say("stopping at the next step, a checkpoint is written first (again to stop at once)")

    with _handling(handler):
        yield requested.is_set
