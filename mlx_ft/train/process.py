"""Entry point of the training process: serves one request, with signs of life. Run by `python -m`.

Does: hold the folder's lock, train, write the result or the error as a file. Does not: restart, or
explain why it died (`supervisor.py`).
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mlx_ft.errors import MlxFtError
from mlx_ft.system.console import Console, Progress
from mlx_ft.system.files import disk_errors_explained, write_json
from mlx_ft.train.handoff import (
    LOCK_FILE,
    RESULT_FILE,
    Pulse,
    forget_answers,
    read_request,
    write_error,
)

# Exit code of a process that has done its share of a run (EX_TEMPFAIL of sysexits.h).
SEGMENT_OVER = 75


class LivingConsole(Console):
    """Console of which every line and every update of progress is a sign of life as well."""

    def __init__(self, stream: TextIO, pulse: Pulse) -> None:
        super().__init__(stream)
        self._pulse = pulse

    def say(self, text: str, style: str | None = None) -> None:
        super().say(text, style)
        self._pulse.beat(text)

    @contextmanager
    def progress(self, title: str, total: float) -> Iterator[Progress]:
        with super().progress(title, total) as line:
            yield _LivingProgress(line, self._pulse)


class _LivingProgress:
    """Progress of which every update is a sign of life as well."""

    def __init__(self, line: Progress, pulse: Pulse) -> None:
        self._line = line
        self._pulse = pulse

    def update(self, done: float, text: str = "") -> None:
        self._line.update(done, text)
        self._pulse.beat(text)


def main(control: Path, console_fd: int, parent: int) -> int:
    """Serve the request in `control`; narrate to an open file descriptor; stop once `parent` is
    gone.
    """
    stream: TextIO = os.fdopen(console_fd, "w", buffering=1, encoding="utf-8", closefd=False)
    pulse = Pulse(control)

    def orphaned() -> bool:
        return os.getppid() != parent

    with (control / LOCK_FILE).open("w") as lock:
        # A process whose supervisor was killed may still be on its way to the next step.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if orphaned():
            return 1
        forget_answers(control)  # that process may have left one in the meantime
        from mlx_ft.train.contract import SegmentOver
        from mlx_ft.train.session import train_one, train_seeds

        pulse.beat("starting")
        try:
            request = read_request(control)
            with disk_errors_explained(request.folder):
                train = train_seeds if request.seeds else train_one
                info = train(request, LivingConsole(stream, pulse), orphaned)
        except MlxFtError as error:
            write_error(control, error)
            return error.exit_code
        except SegmentOver:
            return SEGMENT_OVER
        except KeyboardInterrupt:
            return 130
        write_json(control / RESULT_FILE, info)
        return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
