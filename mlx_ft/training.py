"""The training stage: one seed or several, the best of which goes on.

Does: have each seed trained from the same rows and the same outputs of frozen layers, each in a
folder that is complete or goes on, and say what was chosen and how far the seeds lie apart. Does
not: train (the room does, in a process of its own), or ask models questions.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mlx_ft.cache import cache_home
from mlx_ft.console import Console
from mlx_ft.errors import Fault, GateFailed
from mlx_ft.evaluate.stats import wilson_interval
from mlx_ft.hardware import format_seconds, machine
from mlx_ft.recipe import Recipe
from mlx_ft.runs import complete_stage, hash_of, seal, writing_stage
from mlx_ft.stages import Job

PREFIX_LIMIT_BYTES = 2 << 30
# What the chosen seed leaves in `train/` itself, where a single seed has it too.
OF_THE_CHOSEN = ("adapter", "metrics.jsonl", "samples.jsonl")


def train(job: Job) -> None:
    """Train into `train/`, and look at what the model says before it is called done."""
    inputs, choosing = job.inputs["train"], job.choosing
    if choosing is not None:
        job.console.say(
            f"{len(choosing.samples)} prompts of {choosing.name} choose the weights; the "
            "evaluation does not ask them"
        )
    with writing_stage(job.run, "train", keep_partial=True) as folder:
        if job.recipe.train.seeds:
            info = _train_seeds(job, folder)
        else:
            info = _train_one(job, job.recipe, folder, inputs)
        seal(folder, "train", inputs, info)


def _train_one(job: Job, recipe: Recipe, folder: Path, inputs: str) -> dict[str, Any]:
    """Train one seed into a folder, and return what the training hands over."""
    from mlx_ft.train.handover import TrainStage
    from mlx_ft.train.prompts import Prompt, choose_prompts
    from mlx_ft.train.supervisor import supervise

    prompts = choose_prompts(
        [
            (row.category, Prompt(row.messages[:-1], row.tools))
            for row in job.rows["valid"].rows
            if row.messages is not None
        ]
    )
    stage = TrainStage(
        recipe=recipe,
        model_folder=job.model.path,
        data_folder=job.run / "data",
        folder=folder,
        inputs=inputs,
        model_identity=job.model.identity,
        prefix_folder=cache_home() / "prefix",
        prefix_limit_bytes=min(PREFIX_LIMIT_BYTES, machine().memory_bytes // 4),
        look_prompts=prompts,
        judge_look=job.judged,
    )
    return supervise(stage, job.run, job.console, "mlx_ft.training_process")


def _train_seeds(job: Job, folder: Path) -> dict[str, Any]:
    """Train each seed into `seed-<number>/`, those that are complete already left as they are, and
    put the best one's adapter beside them.

    A seed that a gate stops is not chosen; raises GateFailed when all of them are.
    """
    seeds = job.recipe.train.seeds
    infos: list[Mapping[str, Any]] = []
    for number, seed in enumerate(seeds, start=1):
        name, inputs = f"seed-{seed}", hash_of([job.inputs["train"], seed])
        found = complete_stage(folder, name, inputs)
        said = "is trained already" if found else "begins"
        job.console.say(f"seed {seed} ({number} of {len(seeds)}) {said}")
        if found is None:
            with writing_stage(folder, name, keep_partial=True) as part:
                info = {"seed": seed, **_train_or_stop(job, _with_seed(job.recipe, seed), part)}
                found = seal(part, name, inputs, info)
        infos.append(found.info)
    trained = [info for info in infos if "stopped" not in info]
    if not trained:
        raise GateFailed([Fault(**fault) for info in infos for fault in info["stopped"]])
    best = max(trained, key=_rank)
    for name in OF_THE_CHOSEN:
        _copy(folder / f"seed-{best['seed']}" / name, folder / name)
    seed_info = seeds_info(infos, best, job.recipe)
    _say_seeds(job.console, seed_info)
    return {**best, "seeds": seed_info}


def _with_seed(recipe: Recipe, seed: int) -> Recipe:
    train = recipe.train.model_copy(update={"seed": seed, "seeds": []})
    return recipe.model_copy(update={"train": train})


def _train_or_stop(job: Job, recipe: Recipe, folder: Path) -> dict[str, Any]:
    inputs = hash_of([job.inputs["train"], recipe.train.seed])
    try:
        return _train_one(job, recipe, folder, inputs)
    except GateFailed as error:
        for fault in error.faults:
            job.console.say(f"seed {recipe.train.seed} is stopped: {fault}", "red")
        return {"stopped": [vars(fault) for fault in error.faults]}


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
