"""The names of what a run may be doing. Does not: find out which (`run_list.py`).

Apart, so that the command line knows them without loading what it takes to find out.
"""

from __future__ import annotations

from typing import Literal, get_args

State = Literal[
    "running", "dead", "interrupted", "stopped", "finished", "gate_failed", "failed", "unknown"
]
STATES: tuple[State, ...] = get_args(State)
