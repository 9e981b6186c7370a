"""The training stage from folder to folder: load, adapt, train, look, save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ft.console import Console
from mlx_ft.hardware import format_bytes, format_seconds
from mlx_ft.inference import LoadedModel, load_model, release
from mlx_ft.interrupts import deferred
from mlx_ft.recipe import Recipe
from mlx_ft.tokens import TokenizedSplit, read_split
from mlx_ft.train.adapters import (
    adapter_config,
    load_adapter_weights,
    put_adapter,
    resolve_num_layers,
    save_adapter,
)
from mlx_ft.train.batches import total_iterations, total_updates
from mlx_ft.train.forward import choose_forward
from mlx_ft.train.look import Messages, look
from mlx_ft.train.loop import Listener, TrainingJob, result_info, train
from mlx_ft.train.metrics import Metric


@dataclass(frozen=True)
class TrainStage:
    """Inputs of the stage: the recipe, where model and rows are, where results go."""

    recipe: Recipe
    model_folder: Path
    data_folder: Path
    folder: Path
    inputs: str
    prefix_limit_bytes: int
    look_prompts: Sequence[Messages]


def run_train_stage(stage: TrainStage, console: Console) -> dict[str, Any]:
    """Train, look, and leave `adapter/` in the stage's folder; return the hand-over.

    Raises GateFailed for a degenerate model, Interrupted after a checkpoint.
    """
    recipe = stage.recipe
    train_rows = read_split(stage.data_folder / "train.safetensors")
    validation_rows = read_split(stage.data_folder / "valid.safetensors")
    chat = recipe.chat
    loaded = load_model(
        stage.model_folder, adapter=None, enable_thinking=chat.enable_thinking, date=chat.date
    )
    console.say(f"computing in {loaded.compute}")
    job = _job(stage, loaded, train_rows, validation_rows)
    console.say(job.forward.note)
    console.say(_plan_line(job))
    result = _train(job, console)
    console.say("looking at five answers before anything is merged")
    loaded.model.eval()
    look(loaded, stage.look_prompts, stage.folder / "samples.jsonl", console.say)
    save_adapter(loaded.model, job.adapter_config, stage.folder / "adapter")
    info = result_info(result, job.shape, loaded.compute, job.forward.note)
    del loaded, job
    release()
    return info


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
    proof = [train_rows.row(0)[0].tolist(), *map(_longest_row, (train_rows, validation_rows))]
    return TrainingJob(
        model=loaded.model,
        forward=choose_forward(loaded.model, layers, proof),
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
        prefix_limit_bytes=stage.prefix_limit_bytes,
    )


def _longest_row(split: TokenizedSplit) -> list[int]:
    row: list[int] = split.row(int(split.lengths.argmax()))[0].tolist()
    return row


def _plan_line(job: TrainingJob) -> str:
    recipe = job.recipe
    updates = total_updates(job.iterations, recipe.grad_accumulation_steps)
    return (
        f"{job.shape.trainable_parameters:,} of {job.shape.total_parameters:,} parameters in "
        f"{job.shape.num_layers} layers, scale {recipe.lora_parameters.effective_scale:g}; "
        f"{job.iterations} iterations of {recipe.batch_size} rows = {updates} optimizer updates"
    )


def _train(job: TrainingJob, console: Console) -> Any:
    with console.progress("training", 1.0) as line, deferred(console.say) as stop_requested:

        def progress(done: float, total: float, text: str) -> None:
            line.update(done / total, text)

        listener = Listener(lambda m: console.say(metric_line(m)), progress, stop_requested)
        return train(job, listener)


def metric_line(metric: Metric) -> str:
    """Return a report or validation as one line with units."""
    place = f"iteration {metric['iteration']} of {metric['iterations']}"
    if metric["kind"] == "validation":
        return (
            f"  {place}: validation loss {metric['loss']:.4f} ({metric['trained_tokens']} tokens)"
        )
    return (
        f"  {place} (update {metric['update']} of {metric['updates']}): loss {metric['loss']:.4f}, "
        f"learning rate {metric['learning_rate']:.2e}, "
        f"{metric['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {format_bytes(metric['peak_memory_bytes'])}, "
        f"{format_seconds(metric['seconds_left'])} left"
    )
