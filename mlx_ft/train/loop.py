"""The training run: every mini-batch, report, validation and checkpoint, in order.

Does: train an adapter on tokenized rows, exactly (see `train/numerics/losses.py`), and leave
metrics, checkpoints and the adapter in the stage folder; continue from the last checkpoint. Does
not: render data, merge, or print (it tells a listener).
"""

from __future__ import annotations

import math

import mlx.core as mx

from mlx_ft.errors import Fault, GateFailed, Interrupted
from mlx_ft.train.contract import Listener, SegmentOver, TrainingJob, TrainingResult
from mlx_ft.train.selection import patience_is_over, select, take_chosen, validate
from mlx_ft.train.trainer import SMALLER_STEPS, Run


def train(job: TrainingJob, listener: Listener) -> TrainingResult:
    """Run `job` from its last checkpoint, or from the start, to the end.

    The frozen layers' weights are gone afterwards if their outputs could be kept: load the model
    again to use it. Raises Interrupted after a checkpoint when `listener.stop_requested` says so,
    SegmentOver after `train.segment_steps` mini-batches, GateFailed when the loss stops being a
    number.
    """
    mx.reset_peak_memory()
    run = Run(job, listener)
    try:
        _fill_prefix(run)
        if run.metrics.first("validation") is None:
            validate(run)
        run.start_clock()
        run.show_progress()
        if not patience_is_over(job, run.position):
            _iterate(run)
        take_chosen(run)
    finally:
        run.metrics.close()
    return _result(run)


def _fill_prefix(run: Run) -> None:
    for title, cache in (("rows", run.train_prefix), ("validation", run.validation_prefix)):

        def on_rows(done: int, of: int, title: str = title) -> None:
            run.listener.progress(done, of, f"frozen layers, {title}: {done} of {of}")

        cache.fill(on_rows)
    if run.train_prefix.is_complete and run.validation_prefix.is_complete:
        run.job.forward.release_frozen()
        mx.clear_cache()


def _iterate(run: Run) -> None:
    recipe = run.job.recipe
    save_due = validation_due = selection_due = False
    begun_at = run.position.iteration
    for mini_batch in run.course.plan(run.position.iteration):
        run.step(mini_batch)
        iteration = run.position.iteration
        last = iteration == run.job.iterations
        if last or iteration % recipe.steps_per_report == 0:
            run.report()
        run.show_progress()
        # Between two updates there are gradients in flight: validation and checkpoint wait for the
        # boundary, so that what is measured is what can be saved.
        validation_due = validation_due or run.course.validates_at(iteration)
        selection_due = selection_due or run.course.selects_at(iteration)
        stop = run.listener.stop_requested()
        segment = recipe.segment_steps
        segment_over = segment is not None and iteration - begun_at >= segment and not last
        save_due = save_due or stop or last or segment_over or iteration % recipe.save_every == 0
        if run.window_ends():
            if validation_due:
                save_due = validate(run) or save_due
            if selection_due:
                save_due = select(run) or save_due
            if patience_is_over(run.job, run.position):
                _end_early(run)
                return
            if save_due:
                run.save()
            save_due = validation_due = selection_due = False
        if segment_over and run.window_ends() and not stop:
            raise SegmentOver
        if stop and run.window_ends() and not last:
            raise Interrupted(
                Fault(
                    f"training, iteration {iteration} of {run.job.iterations}",
                    "stopped, checkpoint written",
                    "run the same command again to continue",
                )
            )


def _end_early(run: Run) -> None:
    if run.reported_at != run.position.iteration:
        run.report()
    run.save()


def _result(run: Run) -> TrainingResult:
    place = run.position
    if place.skipped_updates == place.update:
        raise GateFailed(
            Fault(
                f"training, iteration {place.iteration}",
                f"none of {place.update} updates had a finite loss and gradient",
                f"{SMALLER_STEPS}, and look at the rows of the skipped updates",
            )
        )
    first, final = run.metrics.first("validation"), run.metrics.last("validation")
    # A report during which nothing was finite has no loss.
    report = run.metrics.last("train", lambda metric: math.isfinite(metric["loss"]))
    assert first is not None and final is not None and report is not None
    chosen = run.job.recipe.select.by is not None
    per_epoch = -(-len(run.job.train_rows) // run.job.recipe.batch_size)
    return TrainingResult(
        iterations=place.iteration,
        updates=place.update,
        epochs=place.iteration / per_epoch,
        first_validation_loss=first["loss"],
        final_validation_loss=final["loss"],
        final_train_loss=report["loss"],
        trained_tokens=place.trained_tokens,
        seconds=place.seconds,
        peak_memory_bytes=place.peak_memory_bytes,
        skipped_updates=place.skipped_updates,
        best_validation_loss=final["loss"] if place.best_loss is None else place.best_loss,
        best_iteration=place.best_iteration,
        chosen_iteration=place.chosen_iteration if chosen else place.iteration,
        chosen_score=place.chosen_score,
        chosen_validation_loss=(
            place.chosen_loss if place.chosen_loss is not None else final["loss"]
        ),
        ended_early=place.iteration < run.job.iterations,
    )
