"""Who is working on a run folder: a lock that ends with its process.

Does: hold the lock while stages run, and tell other processes whether it is held.
Does not: say how a run ended (`run.json`), or whether a training process hangs (its supervisor
does).
"""

from __future__ import annotations

import fcntl
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mlx_ft.errors import Fault, RunError
from mlx_ft.system.files import disk_errors_explained

LOCK_FILE = ".working"
# Somebody who only asks holds the lock for an instant.
PATIENCE_SECONDS = 2.0


@contextmanager
def working(run: Path) -> Iterator[None]:
    """Hold the lock of a run folder. It is released however the process ends.

    Raises RunError if another process holds it. On a file system without locks nothing is held.
    """
    with disk_errors_explained(run):
        opened = (run / LOCK_FILE).open("a+", encoding="ascii")
    with opened as stream:
        _take(stream, run)
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        yield
        stream.truncate(0)


def _take(stream: TextIO, run: Path) -> None:
    started = time.monotonic()
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() - started < PATIENCE_SECONDS:
                time.sleep(0.05)
                continue
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            found = f"process {holder} works on it" if holder.isdigit() else f"{holder} works on it"
            look = shlex.join(["mlx-ft", "watch", str(run)])
            raise RunError(Fault(str(run), found, f"wait for it, or look at it: {look}")) from None
        except OSError:
            return


def worked_on(run: Path) -> bool | None:
    """Return whether a process is working on this run folder, or None if unknown."""
    try:
        with (run / LOCK_FILE).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False
