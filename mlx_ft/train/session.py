"""The training stage from folder to folder: load, adapt, train, look, save.

One training, or one for each of several seeds on the same ground. Does not: choose between seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mlx_ft.engine.load import release
from mlx_ft.errors import GateFailed
from mlx_ft.recipe.schema import TrainRecipe
from mlx_ft.runs.folder import seal, writing_stage
from mlx_ft.system.console import Console
from mlx_ft.system.signals import deferred
from mlx_ft.text.quantities import format_bytes, format_seconds
from mlx_ft.train.adapters import ADAPTER_FILE, load_adapter_weights, save_adapter
from mlx_ft.train.batches import total_updates
from mlx_ft.train.contract import (
    Listener,
    MakeJudge,
    SegmentOver,
    TrainingJob,
    TrainingResult,
    result_info,
)
from mlx_ft.train.handoff import TrainStage, seed_folder
from mlx_ft.train.loop import train
from mlx_ft.train.metrics import Metric
from mlx_ft.train.sanity_check import look, require_sane
from mlx_ft.train.selection import whole_model
from mlx_ft.train.setup import Ground

# Validations in a row above the lowest one before a line says so.
RISING_VALIDATIONS = 3


@dataclass(frozen=True)
class Around:
    """What a training has around it: who is told, what asks it to stop, and who scores the model.

    `beat` is told what is being done, again and again; `orphaned` asks for a stop like a signal.
    """

    console: Console
    beat: Callable[[str], None] = lambda doing: None
    orphaned: Callable[[], bool] = lambda: False
    make_judge: MakeJudge = lambda *_: None


def run_train_stage(stage: TrainStage, around: Around) -> dict[str, Any]:
    """Train, look, and leave `adapter/` in the stage's folder; return the hand-over.

    Raises GateFailed for a degenerate model, Interrupted after a checkpoint.
    """
    return _train_on(_ground(stage, around), stage, around)


def run_seeds(stage: TrainStage, around: Around) -> dict[str, Any]:
    """Train each seed that is not complete into its own folder, with what it would hand over alone;
    return nothing.

    A seed that a gate stops is sealed with its faults. Raises Interrupted after a checkpoint,
    SegmentOver after each seed but the last where processes are to end now and then.
    """
    ground = None
    asked = stage.recipe.train.seeds
    for seed in [seed for seed in stage.seeds if stage.trained(seed) is None]:
        if ground is not None and stage.recipe.train.segment_steps is not None:
            raise SegmentOver
        around.console.say(f"seed {seed} ({asked.index(seed) + 1} of {len(asked)}) begins")
        if ground is not None and not ground.clear(stage):
            ground = None
            release()
        if ground is None:
            ground = _ground(stage, around)
        one = stage.of_seed(seed)
        with writing_stage(stage.folder, seed_folder(seed), keep_partial=True) as folder:
            info = _train_or_stop(ground, one, around)
            seal(folder, seed_folder(seed), one.inputs, {"seed": seed, **info})
    return {}


def _ground(stage: TrainStage, around: Around) -> Ground:
    ground = Ground(stage)
    around.console.say(f"computing in {ground.loaded.compute}")
    return ground


def _train_or_stop(ground: Ground, stage: TrainStage, around: Around) -> dict[str, Any]:
    try:
        return _train_on(ground, stage, around)
    except GateFailed as error:
        for fault in error.faults:
            around.console.say(f"seed {stage.recipe.train.seed} is stopped: {fault}", "red")
        return {"stopped": [vars(fault) for fault in error.faults]}


def _train_on(ground: Ground, stage: TrainStage, around: Around) -> dict[str, Any]:
    job = ground.job(stage)
    job = replace(job, judge=around.make_judge(stage.recipe, ground.loaded, stage.folder))
    assert (job.judge is not None) == stage.recipe.train.select.asks
    console = around.console
    console.say(job.forward.note)
    console.say(_plan_line(job))
    result = train_job(job, around, ground.remember)
    if stage.recipe.train.select.by is not None:
        console.say(_chosen_line(result))
    info = result_info(result, job.shape, ground.loaded.compute, job.forward.note)
    save_adapter(job.model, job.adapter_config, stage.folder / "adapter")
    # What is looked at, and goes on from here, is what was written.
    load_adapter_weights(job.model, stage.folder / "adapter" / ADAPTER_FILE)
    release()
    around.beat("looking")
    console.say("looking at five answers before anything is merged")
    with whole_model(job):
        job.model.eval()
        samples = look(
            ground.loaded, stage.look_prompts, stage.folder / "samples.jsonl", console.say
        )
    if stage.judge_look:
        require_sane(samples)
    release()
    return info


def _strength(recipe: TrainRecipe) -> str:
    if recipe.fine_tune_type == "full":
        return ", every weight of them"
    kind = "" if recipe.fine_tune_type == "lora" else f", {recipe.fine_tune_type}"
    return f"{kind}, scale {recipe.lora_parameters.effective_scale:g}"


def _plan_line(job: TrainingJob) -> str:
    recipe = job.recipe
    updates = total_updates(job.iterations, recipe.grad_accumulation_steps)
    return (
        f"{job.shape.trainable_parameters:,} of {job.shape.total_parameters:,} parameters in "
        f"{job.shape.num_layers} layers{_strength(recipe)}; "
        f"{job.iterations} iterations of {recipe.batch_size} rows = {updates} optimizer updates"
    )


def train_job(
    job: TrainingJob, around: Around, remember: Callable[[Metric], None] = lambda metric: None
) -> TrainingResult:
    """Train, with a line of progress; every metric is said, and given to `remember`."""
    console = around.console
    with console.progress("training", 1.0) as line, deferred(console.say) as interrupted:

        def metric_found(metric: Metric) -> None:
            remember(metric)
            console.say(metric_line(metric))

        def progress(done: float, total: float, text: str) -> None:
            line.update(done / total, text)
            around.beat(text)

        def stop_requested() -> bool:
            return interrupted() or around.orphaned()

        return train(job, Listener(metric_found, progress, stop_requested, console.say))


def metric_line(metric: Metric) -> str:
    """Return a report or validation as one line with units."""
    place = f"iteration {metric['iteration']} of {metric['iterations']}"
    if metric["kind"] == "selection":
        return f"  {place}: {_comparison(metric)}"
    if metric["kind"] == "validation":
        line = (
            f"  {place}: validation loss {metric['loss']:.4f} ({metric['trained_tokens']} tokens)"
        )
        if metric["validations_since_best"] >= RISING_VALIDATIONS:
            line += (
                f"; above its lowest, at iteration {metric['best_iteration']}, "
                f"{metric['validations_since_best']} times in a row: the run overfits or diverges"
            )
        return line
    if metric["kind"] == "skipped":
        lines = ", ".join(map(str, metric["lines"]))
        return (
            f"  {place}: update {metric['update']} skipped, loss {metric['loss']}, gradient norm "
            f"{metric['gradient_norm']} (train rows of lines {lines})"
        )
    return (
        f"  {place} (update {metric['update']} of {metric['updates']}): loss {metric['loss']:.4f}, "
        f"learning rate {metric['learning_rate']:.2e}, "
        f"gradient norm {metric['gradient_norm']:.3g}, "
        f"{metric['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {format_bytes(metric['peak_memory_bytes'])}, "
        f"{format_seconds(metric['seconds_left'])} left"
    )


def _comparison(metric: Metric) -> str:
    """Return how weights compare with the best so far."""
    if metric["selections_since_best"] == 0:
        against = "the best so far"
    else:
        against = (
            f"not better than at iteration {metric['best_iteration']}, "
            f"{metric['selections_since_best']} in a row"
        )
    if "score" not in metric:
        return f"validation loss {against}"
    interval = f"95 % {metric['low']:.2f} to {metric['high']:.2f}"
    return (
        f"{metric['suite']} {metric['score']:.3f} of {metric['n']} prompts ({interval}), {against}"
    )


def _chosen_line(result: TrainingResult) -> str:
    score = "" if result.chosen_score is None else f"score {result.chosen_score:.3f}, "
    early = ", nothing got better any more" if result.ended_early else ""
    return (
        f"weights of iteration {result.chosen_iteration} are taken: {score}validation loss "
        f"{result.chosen_validation_loss:.4f}; trained to iteration {result.iterations}{early}"
    )
