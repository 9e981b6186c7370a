"""The training process: one job from its folder, with signs of life. `python -m` runs it.

Does: hold the folder's lock, train, leave the result or the error as a file. Does not: restart, or
explain why it died (`supervisor.py`).
"""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path
from typing import TextIO

from mlx_ft.errors import MlxFtError
from mlx_ft.system.console import Console
from mlx_ft.system.files import disk_errors_explained, write_json
from mlx_ft.train.handoff import (
    LOCK_FILE,
    RESULT_FILE,
    Pulse,
    forget_answers,
    read_stage,
    write_error,
)
from mlx_ft.train.judge import judge

# Exit code of a process that has done its share of a run (EX_TEMPFAIL of sysexits.h).
SEGMENT_OVER = 75


def main(control: Path, console_fd: int, parent: int) -> int:
    """Run the job in `control`; narrate to an open file descriptor; stop when `parent` is gone."""
    stream: TextIO = os.fdopen(console_fd, "w", buffering=1, encoding="utf-8", closefd=False)
    pulse = Pulse(control)
    with (control / LOCK_FILE).open("w") as lock:
        # A process whose supervisor was killed may still be on its way to the next step.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.getppid() != parent:
            return 1
        forget_answers(control)  # that process may have left one in the meantime
        from mlx_ft.train.contract import SegmentOver
        from mlx_ft.train.session import Around, run_seeds, run_train_stage

        pulse.beat("starting")
        try:
            stage = read_stage(control)
            with disk_errors_explained(stage.folder):
                around = Around(Console(stream), pulse.beat, lambda: os.getppid() != parent, judge)
                info = (run_seeds if stage.seeds else run_train_stage)(stage, around)
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
