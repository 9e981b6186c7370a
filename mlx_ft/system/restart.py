"""Begin this command anew after a GPU failed: only a new process has a GPU that works again.

Does: count attempts over processes; replace this process by a new one of the same command. Does
not: keep results. What a run has finished is in its folder, and the command goes on from there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mlx_ft.system.gpu_errors import Cause

FAILURES = "MLX_FT_GPU_FAILURES"
MAX_FAILURES = 3


def failures_with_this_one() -> int:
    """Return how often this command has failed, the present failure counted."""
    return int(os.environ.get(FAILURES, "0")) + 1


def failure_in_words(cause: Cause, verb: str) -> str:
    """Return the message of a failure: its cause, and what happens or helps now."""
    failures = failures_with_this_one()
    if failures < MAX_FAILURES:
        return f"{verb}: {cause.words} - it begins again where it was, in a new process"
    return f"{verb}: {cause.words}, {failures} times - {cause.fix}; what was finished is kept"


def begin_again(arguments: Sequence[str]) -> None:
    """Replace this process by a new one of the same command; return after MAX_FAILURES.

    arguments: of the command line, without the program's name.
    """
    failures = failures_with_this_one()
    if failures >= MAX_FAILURES:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[FAILURES] = str(failures)
    os.execv(sys.executable, [sys.executable, "-m", "mlx_ft", *arguments])
