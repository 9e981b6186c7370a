"""The training stage from folder to folder: load, adapt, train, look, save."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ft import BLAS
from mlx_ft.console import Console
from mlx_ft.cpu_math import CPU_MATH_VERSION, exp_is_slow
from mlx_ft.hardware import format_bytes, format_seconds
from mlx_ft.inference import LoadedModel, load_model, release
from mlx_ft.interrupts import deferred
from mlx_ft.recipe import TrainRecipe
from mlx_ft.runs import hash_of
from mlx_ft.tokens import Ids, TokenizedSplit, read_split
from mlx_ft.train.adapters import (
    adapter_config,
    load_adapter_weights,
    put_adapter,
    resolve_num_layers,
    save_adapter,
)
from mlx_ft.train.batches import total_iterations, total_updates
from mlx_ft.train.forward import choose_forward
from mlx_ft.train.handover import TrainStage
from mlx_ft.train.job import Listener, MakeJudge, TrainingJob, TrainingResult, result_info
from mlx_ft.train.look import look, require_sane
from mlx_ft.train.loop import train
from mlx_ft.train.metrics import Metric

# Validations in a row above the lowest one before a line says so.
RISING_VALIDATIONS = 3
# Freed arrays that MLX may hold on to with train.low_memory.
LOW_MEMORY_CACHE_BYTES = 256 << 20


def run_train_stage(
    stage: TrainStage,
    console: Console,
    beat: Callable[[str], None] = lambda doing: None,
    orphaned: Callable[[], bool] = lambda: False,
    make_judge: MakeJudge = lambda *_: None,
) -> dict[str, Any]:
    """Train, look, and leave `adapter/` in the stage's folder; return the hand-over.

    `beat` is told what is being done, again and again; `orphaned` asks for a stop like a signal.
    `make_judge` says who scores the model in training. Raises GateFailed for a degenerate model,
    Interrupted after a checkpoint.
    """
    train_rows = read_split(stage.data_folder / "train.safetensors")
    validation_rows = read_split(stage.data_folder / "valid.safetensors")
    low_memory = stage.recipe.train.low_memory
    if low_memory:
        mx.set_cache_limit(LOW_MEMORY_CACHE_BYTES)
    loaded = _load(stage, None, low_memory)
    console.say(f"computing in {loaded.compute}")
    job = _job(stage, loaded, train_rows, validation_rows)
    job = replace(job, judge=make_judge(stage.recipe, loaded, stage.folder))
    assert (job.judge is not None) == stage.recipe.train.select.asks
    console.say(job.forward.note)
    console.say(_plan_line(job))
    result = _train(job, console, beat, orphaned)
    if stage.recipe.train.select.by is not None:
        console.say(_chosen_line(result))
    info = result_info(result, job.shape, loaded.compute, job.forward.note)
    adapter = stage.folder / "adapter"
    save_adapter(loaded.model, job.adapter_config, adapter)
    del loaded, job
    release()
    beat("looking")
    console.say("looking at five answers before anything is merged")
    # Not held expanded here either: it would need what the training was to do without.
    tuned = _load(stage, adapter, low_memory)
    samples = look(tuned, stage.look_prompts, stage.folder / "samples.jsonl", console.say)
    if stage.judge_look:
        require_sane(samples)
    del tuned
    release()
    return info


def _load(stage: TrainStage, adapter: Path | None, low_memory: bool) -> LoadedModel:
    chat = stage.recipe.chat
    return load_model(
        stage.model_folder,
        adapter=adapter,
        enable_thinking=chat.enable_thinking,
        date=chat.date,
        low_memory=low_memory,
    )


def _computed_by(stage: TrainStage, loaded: LoadedModel, frozen_layers: int) -> str:
    """Return a hash of all that the outputs of frozen layers depend on, but the rows."""
    return hash_of(
        [
            stage.model_identity,
            frozen_layers,
            loaded.compute,
            {package: version(package) for package in ("mlx", "mlx-lm")},
            # The order of sums, and so the last bits, depends on how many threads share them.
            [BLAS.name, BLAS.detail, os.cpu_count(), os.environ.get("OPENBLAS_NUM_THREADS")],
            CPU_MATH_VERSION if exp_is_slow() else None,
        ]
    )


def _job(
    stage: TrainStage,
    loaded: LoadedModel,
    train_rows: TokenizedSplit,
    validation_rows: TokenizedSplit,
) -> TrainingJob:
    train_recipe = stage.recipe.train
    layers = resolve_num_layers(train_recipe.num_layers, len(loaded.model.layers))
    config = adapter_config(stage.recipe, layers)
    shape = put_adapter(loaded.model, train_recipe, config)
    if train_recipe.resume_adapter_file is not None:
        load_adapter_weights(loaded.model, Path(train_recipe.resume_adapter_file))
    loaded.model.eval()
    proof = [max(map(_longest_row, (train_rows, validation_rows)), key=len).tolist()]
    forward = choose_forward(
        loaded.model,
        layers,
        proof,
        train_recipe.grad_checkpoint,
        stage.model_folder if train_recipe.low_memory else None,
    )
    return TrainingJob(
        model=loaded.model,
        forward=forward,
        shape=shape,
        adapter_config=config,
        train_rows=train_rows,
        validation_rows=validation_rows,
        recipe=train_recipe,
        iterations=total_iterations(
            len(train_rows), train_recipe.batch_size, train_recipe.epochs, train_recipe.iters
        ),
        folder=stage.folder,
        inputs=stage.inputs,
        prefix_limit_bytes=0 if train_recipe.prefix_cache == "off" else stage.prefix_limit_bytes,
        prefix_folder=stage.prefix_folder if train_recipe.prefix_cache == "disk" else None,
        computed_by=_computed_by(stage, loaded, forward.frozen_layers),
        shuffle=not stage.recipe.data.in_order,
        model_folder=stage.model_folder,
    )


def _longest_row(split: TokenizedSplit) -> Ids:
    return split.row(int(np.argmax(split.lengths)))[0]


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


def _train(
    job: TrainingJob, console: Console, beat: Callable[[str], None], orphaned: Callable[[], bool]
) -> TrainingResult:
    with console.progress("training", 1.0) as line, deferred(console.say) as interrupted:

        def progress(done: float, total: float, text: str) -> None:
            line.update(done / total, text)
            beat(text)

        def stop_requested() -> bool:
            return interrupted() or orphaned()

        listener = Listener(lambda m: console.say(metric_line(m)), progress, stop_requested)
        return train(job, listener)


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
