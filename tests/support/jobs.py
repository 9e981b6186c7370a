"""A recipe, a suite and rows in one folder, and its job."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.models import write_tiny_model
from tests.support.rows import write_rows

if TYPE_CHECKING:
    from mlx_ft.inputs import OpenRun
    from mlx_ft.job import Job


RECIPE = """
name: tiny
model: ./model
data: {path: data}
preflight: {accept: {base_health: a random model}}
train:
  num_layers: 2
  epochs: 40
  learning_rate: 3e-3
  lora_parameters: {rank: 16}
  steps_per_report: 60
  steps_per_eval: 120
export: {q_group_size: 32}
eval: {suites: [suite.yaml]}
"""
SUITE = """
name: small
description: Whether the tiny model says anything.
samples: suite.jsonl
scorer: {name: talk, forbid: [execute_code]}
max_tokens: 12
enable_thinking: false
"""


def write_place(folder: Path) -> None:
    """Write a model, rows, a suite and a recipe into `folder`."""
    write_tiny_model(folder / "model")
    write_rows(folder / "data")
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "suite.yaml").write_text(SUITE)
    samples = [
        {
            "id": f"s{number}",
            "category": "talk",
            "messages": [{"role": "user", "content": f"quick brown {number}"}],
            "target": {"any_of": []},
        }
        for number in range(3)
    ]
    (folder / "suite.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))


def job_of(place: Path, *sets: str) -> "Job":
    """Return the job of the recipe in `place`, whose runs are kept there too."""
    return open_run_of(place, *sets).job


def open_run_of(place: Path, *sets: str) -> "OpenRun":
    """Return the run of the recipe in `place`, opened, with what its stages are given."""
    from mlx_ft.inputs import open_run
    from mlx_ft.recipe.load import load_recipe
    from mlx_ft.system.console import Console

    return open_run(load_recipe(place / "r.yaml", sets), place / "runs", Console())
