"""The training loop: every mini-batch, report, validation and checkpoint, in order.

Does: train an adapter on tokenized rows, exactly (see `train/numerics/losses.py`), and leave
metrics, checkpoints and the adapter in the stage folder; continue from the last checkpoint. Does
not: render data, or merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_ft.errors import Fault, GateFailed, Interrupted
from mlx_ft.system.console import Console, Progress
from mlx_ft.train.contract import SegmentOver, TrainingInputs, TrainingResult
from mlx_ft.train.metrics import Metric
from mlx_ft.train.selection import load_selected, patience_is_over, select, validate
from mlx_ft.train.trainer import SMALLER_STEPS, Trainer


def train(
    inputs: TrainingInputs,
    console: Console,
    progress: Progress,
    stop_requested: Callable[[], bool] = lambda: False,
    on_metric: Callable[[Metric], None] = lambda metric: None,
) -> TrainingResult:
    """Train from the last checkpoint, or from the start, to the end.

    progress: shows the share of the work that is done; its total is 1.
    stop_requested: asked at every step; True ends the training after a checkpoint.
    on_metric: receives every report, validation and comparison.

    The frozen layers' weights are released if their outputs could be kept: load the model again to
    use it. Raises Interrupted after a requested stop, SegmentOver after `train.segment_steps`
    mini-batches, GateFailed when the loss is no longer finite.
    """
    mx.reset_peak_memory()
    trainer = Trainer(inputs, console, progress, on_metric)
    try:
        _fill_prefixes(trainer)
        if trainer.metrics.first("validation") is None:
            validate(trainer)
        trainer.start_clock()
        trainer.show_progress()
        if not patience_is_over(inputs, trainer.position):
            _iterate(trainer, stop_requested)
        load_selected(trainer)
    finally:
        trainer.metrics.close()
    return _result(trainer)


def _fill_prefixes(trainer: Trainer) -> None:
    trainer.train_prefix.fill(trainer.progress)
    trainer.validation_prefix.fill(trainer.progress)
    if trainer.train_prefix.is_complete and trainer.validation_prefix.is_complete:
        trainer.inputs.forward.release_frozen()
        mx.clear_cache()


def _iterate(trainer: Trainer, stop_requested: Callable[[], bool]) -> None:
    inputs, plan = trainer.inputs, trainer.plan
    recipe = inputs.recipe
    save_due = validation_due = selection_due = False
    begun_at = trainer.position.iteration
    for mini_batch in plan.mini_batches(trainer.position.iteration):
        trainer.step(mini_batch)
        iteration = trainer.position.iteration
        last = iteration == inputs.iterations
        if last or iteration % recipe.steps_per_report == 0:
            trainer.report()
        trainer.show_progress()
        # Between two updates there are gradients in flight: validation and checkpoint wait for the
        # boundary, so that the weights that are measured can be saved.
        validation_due = validation_due or plan.validates_at(iteration)
        selection_due = selection_due or plan.selects_at(iteration)
        stop = stop_requested()
        segment = recipe.segment_steps
        segment_over = segment is not None and iteration - begun_at >= segment and not last
        save_due = save_due or stop or last or segment_over or iteration % recipe.save_every == 0
        if trainer.window_ends():
            if validation_due:
                save_due = validate(trainer) or save_due
            if selection_due:
                save_due = select(trainer) or save_due
            if patience_is_over(inputs, trainer.position):
                _end_early(trainer)
                return
            if save_due:
                trainer.save()
            save_due = validation_due = selection_due = False
        if segment_over and trainer.window_ends() and not stop:
            raise SegmentOver
        if stop and trainer.window_ends() and not last:
            raise Interrupted(
                Fault(
                    f"training, iteration {iteration} of {inputs.iterations}",
                    "stopped, checkpoint written",
                    "run the same command again to continue",
                )
            )


def _end_early(trainer: Trainer) -> None:
    if trainer.reported_at != trainer.position.iteration:
        trainer.report()
    trainer.save()


def _result(trainer: Trainer) -> TrainingResult:
    inputs, position = trainer.inputs, trainer.position
    if position.skipped_updates == position.update:
        raise GateFailed(
            Fault(
                f"training, iteration {position.iteration}",
                f"none of {position.update} updates had a finite loss and gradient",
                f"{SMALLER_STEPS}, and look at the rows of the skipped updates",
            )
        )
    first, final = trainer.metrics.first("validation"), trainer.metrics.last("validation")
    # A report during which nothing was finite has no loss.
    report = trainer.metrics.last("train", lambda metric: math.isfinite(metric["loss"]))
    assert first is not None and final is not None and report is not None
    selects = inputs.recipe.select.by is not None
    per_epoch = -(-len(inputs.train_rows) // inputs.recipe.batch_size)
    return TrainingResult(
        iterations=position.iteration,
        updates=position.update,
        epochs=position.iteration / per_epoch,
        first_validation_loss=first["loss"],
        final_validation_loss=final["loss"],
        final_train_loss=report["loss"],
        trained_tokens=position.trained_tokens,
        seconds=position.seconds,
        peak_memory_bytes=position.peak_memory_bytes,
        skipped_updates=position.skipped_updates,
        best_validation_loss=final["loss"] if position.best_loss is None else position.best_loss,
        best_iteration=position.best_iteration,
        chosen_iteration=position.chosen_iteration if selects else position.iteration,
        chosen_score=position.chosen_score,
        chosen_validation_loss=(
            position.chosen_loss if position.chosen_loss is not None else final["loss"]
        ),
        ended_early=position.iteration < inputs.iterations,
    )
