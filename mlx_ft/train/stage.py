"""The training stage: one seed or several, the best of which goes on.

Does: have each seed trained from the same rows and the same outputs of frozen layers, each in a
folder that is complete or goes on, and say what was chosen and how far the seeds lie apart. Does
not: train (the room does, in a process of its own), or ask models questions.
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
    from mlx_ft.train.handoff import TrainStage

PREFIX_LIMIT_BYTES = 2 << 30
# What the chosen seed leaves in `train/` itself, where a single seed has it too.
OF_THE_CHOSEN = ("adapter", "metrics.jsonl", "samples.jsonl")


def train(job: Job, valid: FileRows, choosing: Suite | None) -> None:
    """Train into `train/`, and look at what the model says before it is called done.

    valid: the validation rows, which give the prompts of the look.
    choosing: the prompts that choose a checkpoint, or None.
    """
    if choosing is not None:
        job.console.say(
            f"{len(choosing.samples)} prompts of {choosing.name} choose the weights; the "
            "evaluation does not ask them"
        )
    with writing_stage(job.run, "train", keep_partial=True) as folder:
        stage = _stage(job, valid, folder)
        info = _train_seeds(job, stage) if stage.seeds else _supervise(job, stage)
        seal(folder, "train", job.inputs["train"], info)


def _stage(job: Job, valid: FileRows, folder: Path) -> TrainStage:
    """Return what the training room is to do, into a folder."""
    from mlx_ft.train.handoff import TrainStage
    from mlx_ft.train.sanity_check import Prompt, choose_prompts

    prompts = choose_prompts(
        [
            (row.category, Prompt(row.messages[:-1], row.tools))
            for row in valid.rows
            if row.messages is not None
        ]
    )
    return TrainStage(
        recipe=job.recipe,
        model_folder=job.model.path,
        data_folder=job.run / "data",
        folder=folder,
        inputs=job.inputs["train"],
        model_identity=job.model.identity,
        prefix_folder=cache_home() / "prefix",
        prefix_limit_bytes=min(PREFIX_LIMIT_BYTES, machine().memory_bytes // 4),
        look_prompts=prompts,
        judge_look=job.judged,
        seeds=tuple(job.recipe.train.seeds),
    )


def _supervise(job: Job, stage: TrainStage) -> dict[str, Any]:
    from mlx_ft.train.supervisor import supervise

    return supervise(stage, job.run, job.console)


def _train_seeds(job: Job, stage: TrainStage) -> dict[str, Any]:
    """Have each seed trained into `seed-<number>/`, those that are complete left as they are, and
    put the best one's adapter beside them.

    A seed that a gate stops is not chosen; raises GateFailed when all of them are.
    """
    from mlx_ft.train.handoff import seed_folder

    left = []
    for seed in stage.seeds:
        if stage.trained(seed) is None:
            left.append(seed)
        else:
            job.console.say(f"seed {seed} is trained already")
    if left:
        _supervise(job, replace(stage, seeds=tuple(left)))
    found = [stage.trained(seed) for seed in stage.seeds]
    infos = [manifest.info for manifest in found if manifest is not None]
    assert len(infos) == len(stage.seeds), "a seed has no result"
    trained = [info for info in infos if "stopped" not in info]
    if not trained:
        raise GateFailed([Fault(**fault) for info in infos for fault in info["stopped"]])
    best = max(trained, key=_rank)
    for name in OF_THE_CHOSEN:
        _copy(stage.folder / seed_folder(best["seed"]) / name, stage.folder / name)
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
    """Return what the seeds came to, as JSON.

    `trained` has an entry a seed, `chosen` is the best one's number, `spread` the mean, ends and
    standard deviation of what chose it; `reached`, with a suite that chooses, counts the seeds at
    or above `train.select.gate`, with Wilson's 95 % interval of the probability of that.
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
