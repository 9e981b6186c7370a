"""Run folders of several experiments, to be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_ft.runs.folder import read_manifest, seal
from mlx_ft.system.files import write_json
from tests.support.run_folders import write_run


def write_experiment(
    folder: Path,
    name: str,
    sets: Mapping[str, Any],
    validation_loss: float,
    rows: int,
    wrong: int = 1,
) -> Path:
    """Write a finished run called `name`: `sets` are dotted keys of its recipe, `wrong` how many of
    its code_mode answers of the quantized model score 0.
    """
    run = write_run(folder / name).rename(folder / f"{name}-0a1b2c3d")
    stored = json.loads((run / "recipe.json").read_text())
    for key, value in sets.items():
        section = stored["recipe"]
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
        stored["origins"][key] = "--set"
    write_json(run / "recipe.json", stored)
    record = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", {**record, "run": run.name})
    stats = json.loads((run / "data" / "stats.json").read_text())
    stats["splits"]["train"]["rows"] = rows
    write_json(run / "data" / "stats.json", stats)
    reseal(run / "data")
    reseal(run / "train", final_validation_loss=validation_loss)
    path = run / "eval" / "code_mode" / "quantized.jsonl"
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    for number, answer in enumerate(answers):
        answer["score"] = float(number >= wrong)
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return run


def reseal(stage: Path, **info: Any) -> None:
    """Write a stage's manifest anew, with some of its hand-over changed."""
    manifest = read_manifest(stage) or read_loose(stage)
    seal(stage, manifest.stage, manifest.inputs, {**manifest.info, **info})


def read_loose(stage: Path) -> Any:
    from mlx_ft.runs.folder import Manifest

    value = json.loads((stage / "manifest.json").read_text())
    return Manifest(value["stage"], value["inputs"], value["files"], value["info"])
