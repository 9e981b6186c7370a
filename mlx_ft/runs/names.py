"""Names of a run's states and of its stages. Imports nothing.

The only home of these names, light enough for `mlx-ft --help`.
"""

from __future__ import annotations

from typing import Literal, get_args

State = Literal[
    "running", "dead", "interrupted", "stopped", "finished", "gate_failed", "failed", "unknown"
]
STATES: tuple[State, ...] = get_args(State)

# The stages of the pipeline, in order. Each is a key of `stages` in run.json.
StageName = Literal["data", "preflight", "base", "train", "export", "eval"]
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)
# Stages that are a folder with a manifest.
KEPT_STAGES: tuple[StageName, ...] = ("data", "train", "export", "eval")
# Stages that leave an artifact of their own in the run folder: a folder, or preflight.json.
RECORDED_STAGES: tuple[StageName, ...] = ("data", "preflight", "train", "export", "eval")
