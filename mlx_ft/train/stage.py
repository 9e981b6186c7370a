"""Stage entry (parent process): request the training of one seed or several; pick the best seed.

Does: skip seeds that are complete, and report how far the seeds lie apart. Does not: train, which
a process of its own does (`supervisor.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from mlx_ft.errors import Fault, GateFailed
from mlx_ft.evaluate.stats import wilson_interval
from mlx_ft.job import Job
from mlx_ft.recipe.schema import Recipe
from mlx_ft.runs.folder import seal, writing_stage
from mlx_ft.system.cache import cache_home
from mlx_ft.system.console import Console
from mlx_ft.system.hardware import machine
from mlx_ft.text.quantities import format_seconds

if TYPE_CHECKING:
    from mlx_ft.data.rows import FileRows
    from mlx_ft.evaluate.suites import Suite
    from mlx_ft.train.handoff import TrainRequest

PREFIX_LIMIT_BYTES = 2 << 30
# Files of the best seed that are copied into `train/`, where a single seed has them too.
OF_THE_CHOSEN = ("adapter", "metrics.jsonl", "samples.jsonl")


def train(job: Job, valid: FileRows, selection: Suite | None) -> None:
    """Train into `train/`, with a sanity check at the end.

    valid: the validation rows, which give the prompts of the sanity check.
    selection: the prompts that select a checkpoint (None: no prompts do).
    """
    if selection is not None:
        job.console.say(
            f"{len(selection.samples)} prompts of {selection.name} choose the weights; the "
            "evaluation does not ask them"
        )
    with writing_stage(job.folder, "train", keep_partial=True) as folder:
        request = _request(job, valid, folder)
        info = _train_seeds(job, request) if request.seeds else _supervise(job, request)
        seal(folder, "train", job.inputs["train"], info)


def _request(job: Job, valid: FileRows, folder: Path) -> TrainRequest:
    """Return the request to train the job into a folder."""
    from mlx_ft.train.handoff import TrainRequest
    from mlx_ft.train.sanity_check import Prompt, choose_prompts

    prompts = choose_prompts(
        [
            (row.category, Prompt(row.messages[:-1], row.tools))
            for row in valid.rows
            if row.messages is not None
        ]
    )
    return TrainRequest(
        recipe=job.recipe,
        model_folder=job.model.path,
        data_folder=job.folder / "data",
        folder=folder,
        inputs=job.inputs["train"],
        model_identity=job.model.identity,
        prefix_folder=cache_home() / "prefix",
        prefix_limit_bytes=min(PREFIX_LIMIT_BYTES, machine().memory_bytes // 4),
        sanity_prompts=prompts,
        sanity_required=job.judged,
        seeds=tuple(job.recipe.train.seeds),
    )


def _supervise(job: Job, request: TrainRequest) -> dict[str, Any]:
    from mlx_ft.train.supervisor import supervise

    return supervise(request, job.folder, job.console)


def _train_seeds(job: Job, request: TrainRequest) -> dict[str, Any]:
    """Train each seed that is not complete into `seed-<number>/`; copy the best one's files beside.

    A seed that a gate stops is not picked. Raises GateFailed when all of them are stopped.
    """
    from mlx_ft.train.handoff import seed_folder

    left = []
    for seed in request.seeds:
        if request.trained(seed) is None:
            left.append(seed)
        else:
            job.console.say(f"seed {seed} is trained already")
    if left:
        _supervise(job, replace(request, seeds=tuple(left)))
    found = [request.trained(seed) for seed in request.seeds]
    infos = [manifest.info for manifest in found if manifest is not None]
    assert len(infos) == len(request.seeds), "a seed has no result"
    trained = [info for info in infos if "stopped" not in info]
    if not trained:
        raise GateFailed([Fault(**fault) for info in infos for fault in info["stopped"]])
    best = max(trained, key=_rank)
    for name in OF_THE_CHOSEN:
        _copy(request.folder / seed_folder(best["seed"]) / name, request.folder / name)
    seed_info = seeds_info(infos, best, job.recipe)
    _say_seeds(job.console, seed_info)
    return {**best, "seeds": seed_info}


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def _rank(info: Mapping[str, Any]) -> tuple[float, float]:
    return (info["chosen_score"] or 0.0, -info["chosen_validation_loss"])


def seeds_info(
    infos: Sequence[Mapping[str, Any]], best: Mapping[str, Any], recipe: Recipe
) -> dict[str, Any]:
    """Return the results of all seeds, as JSON.

    chosen: the best seed.
    trained: one entry for each seed.
    spread: mean, ends and standard deviation of the measure that picks the seed.
    reached: number of seeds at or above `train.select.gate`, with Wilson's 95 % interval of its
        probability (None: no suite selects).
    """
    select = recipe.train.select
    measure = "score" if select.asks else "validation_loss"
    entries = [_entry(info, select.gate if select.asks else None) for info in infos]
    values = [entry[measure] for entry in entries if entry[measure] is not None]
    result: dict[str, Any] = {
        "chosen": best["seed"],
        "trained": entries,
        "spread": {
            "measure": measure,
            "mean": fmean(values),
            "low": min(values),
            "high": max(values),
            "deviation": stdev(values) if len(values) > 1 else None,
        },
        "reached": None,
    }
    if select.asks:
        reached = sum(entry["reached"] for entry in entries)
        low, high = wilson_interval(reached / len(entries), len(entries))
        result["reached"] = {
            "gate": select.gate,
            "count": reached,
            "of": len(entries),
            "low": low,
            "high": high,
        }
    return result


def _entry(info: Mapping[str, Any], gate: float | None) -> dict[str, Any]:
    if "stopped" in info:
        why = "; ".join(f"{fault['where']}: {fault['found']}" for fault in info["stopped"])
        nothing = dict.fromkeys(("score", "validation_loss", "iteration", "iterations", "seconds"))
        return {"seed": info["seed"], "stopped": why, **nothing, "reached": False}
    score = info["chosen_score"]
    return {
        "seed": info["seed"],
        "stopped": None,
        "score": score,
        "validation_loss": info["chosen_validation_loss"],
        "iteration": info["chosen_iteration"],
        "iterations": info["iterations"],
        "seconds": info["seconds"],
        "reached": None if gate is None else score >= gate,
    }


def _say_seeds(console: Console, info: Mapping[str, Any]) -> None:
    for entry in info["trained"]:
        mark = " <- chosen" if entry["seed"] == info["chosen"] else ""
        if entry["stopped"] is not None:
            console.say(f"  seed {entry['seed']}: stopped")
            continue
        score = "" if entry["score"] is None else f"score {entry['score']:.3f}, "
        console.say(
            f"  seed {entry['seed']}: {score}validation loss {entry['validation_loss']:.4f}, "
            f"weights of iteration {entry['iteration']} of {entry['iterations']}, "
            f"{format_seconds(entry['seconds'])}{mark}"
        )
    reached = info["reached"]
    if reached is not None:
        console.say(
            f"  {reached['count']} of {reached['of']} seeds reached {reached['gate']:g}: "
            f"a seed does so with probability {reached['low']:.2f} to {reached['high']:.2f} (95 %)"
        )
