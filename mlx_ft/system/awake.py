"""Keep a Mac from falling asleep while a run works.

Does not: keep the display on, or a closed lid from sleep.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def awake() -> Iterator[bool]:
    """Within, macOS does not sleep for idleness; yield whether this had an effect.

    `caffeinate -w` ends by itself when this process is gone.
    """
    tool = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if tool is None:
        yield False
        return
    process = subprocess.Popen(
        [tool, "-i", "-w", str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield True
    finally:
        process.terminate()
        process.wait()
