"""The training run: every mini-batch, report, validation and checkpoint, in order.

Does: train an adapter on tokenized rows, exactly (see `losses.py`), and leave metrics, checkpoints
and the adapter in the stage folder; continue from the last checkpoint. Does not: render data,
merge, or print (it tells a listener).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_ft.errors import Fault, GateFailed, Interrupted
from mlx_ft.inference import scalar
from mlx_ft.tokens import TokenizedSplit
from mlx_ft.train.batches import MiniBatch, plan_run, plan_validation, total_updates
from mlx_ft.train.checkpoint_folder import CHECKPOINTS, complete_checkpoints
from mlx_ft.train.checkpoints import (
    Position,
    restore_checkpoint,
    save_checkpoint,
)
from mlx_ft.train.job import Listener, SegmentOver, TrainingJob, TrainingResult
from mlx_ft.train.losses import Batch, cross_entropy_sum
from mlx_ft.train.metrics import METRICS_FILE, Metric, MetricsFile
from mlx_ft.train.prefix import PrefixCache, content_key
from mlx_ft.train.prefix_store import Place
from mlx_ft.train.schedules import learning_rate_at
from mlx_ft.train.shared_start import choose_start
from mlx_ft.train.steps import GradientWindow, Update, build_optimizer, micro_batches

# A trained token costs about three forward passes of it (forward, and twice that backward).
TRAIN_COST, VALIDATION_COST = 3, 1
# Room for the groups of rows that a mini-batch is cut into.
SEEDS_PER_ITERATION = 1 << 12
# Updates in a row whose loss or gradient is not finite: one may be a row's fault, more are not.
MAX_SKIPPED_IN_A_ROW = 3


def _prefix_caches(job: TrainingJob) -> tuple[PrefixCache, PrefixCache]:
    """Return the caches of training and validation rows, not filled yet."""
    job.model.eval()
    splits = (job.train_rows, job.validation_rows)
    start = choose_start(job.model, job.forward, splits)

    def cache(rows: TokenizedSplit, limit_bytes: int) -> PrefixCache:
        place = None
        if job.prefix_folder is not None and job.forward.frozen_layers:
            start_tokens = 0 if start is None else start.tokens
            key = content_key(rows, f"{job.computed_by}, start {start_tokens}")
            place = Place(job.prefix_folder, key)
        return PrefixCache(job.forward, rows, limit_bytes, start, place)

    limit = job.prefix_limit_bytes
    return cache(job.train_rows, limit), cache(job.validation_rows, limit // 4)


class _Run:
    """The moving parts of one run, between `position` and the end."""

    def __init__(self, job: TrainingJob, listener: Listener) -> None:
        self.job = job
        self.listener = listener
        self.updates = total_updates(job.iterations, job.recipe.grad_accumulation_steps)
        self.rate = learning_rate_at(job.recipe.lr_schedule, job.recipe.learning_rate, self.updates)
        self.optimizer = build_optimizer(job.recipe)
        self.optimizer.init(job.model.trainable_parameters())
        self.train_prefix, self.validation_prefix = _prefix_caches(job)
        self.position = self._resume()
        self.metrics = MetricsFile(job.folder / METRICS_FILE, self.position.iteration)
        self.validation_batches = plan_validation(
            job.validation_rows.lengths, job.recipe.batch_size, job.recipe.val_batches
        )
        self.window = GradientWindow(
            job.model, self._loss, self.optimizer, job.recipe.max_grad_norm
        )
        self._report_tokens = 0
        self.start_clock()
        self._count_cost()

    def start_clock(self) -> None:
        """Begin to count training time; what came before was not training."""
        self._clock = self._report_started = time.perf_counter()

    def _resume(self) -> Position:
        checkpoints = complete_checkpoints(self.job.folder / CHECKPOINTS, self.job.inputs)
        if not checkpoints:
            return Position()
        return restore_checkpoint(checkpoints[-1], self.job.model, self.optimizer)

    def _loss(self, batch: Batch, prefix: mx.array) -> mx.array:
        return cross_entropy_sum(self.job.forward, batch, prefix)

    def plan(self, start: int) -> Iterator[MiniBatch]:
        """Return the mini-batches after iteration `start`."""
        job = self.job
        batch_size, seed = job.recipe.batch_size, job.recipe.seed
        rows = len(job.train_rows)
        return plan_run(rows, batch_size, seed, job.iterations, start, job.shuffle)

    def _count_cost(self) -> None:
        """Add up the work of the whole run, known from the plan, so that time left is honest."""
        lengths = self.job.train_rows.lengths
        done_at = [0.0]
        for mini_batch in self.plan(0):
            tokens = int(lengths[list(mini_batch.rows)].sum())
            cost = TRAIN_COST * tokens + self._validation_cost(mini_batch.iteration)
            done_at.append(done_at[-1] + cost)
        self._cost_done_at = done_at

    def _validation_cost(self, iteration: int) -> float:
        if not self.validates_at(iteration):
            return 0.0
        rows = [row for batch in self.validation_batches for row in batch]
        return VALIDATION_COST * float(self.job.validation_rows.lengths[rows].sum())

    def validates_at(self, iteration: int) -> bool:
        """Say whether a validation is due after this iteration."""
        return iteration == self.job.iterations or iteration % self.job.recipe.steps_per_eval == 0

    def validate(self) -> bool:
        """Measure the weights as they are on the fixed validation set, per trained token; return
        whether they are the best so far.
        """
        self.job.model.eval()
        total, weight, tokens = 0.0, 0.0, 0
        prefix = self.validation_prefix
        for mini_batch in self.validation_batches:
            for batch in self._micro_batches(self.job.validation_rows, prefix, mini_batch):
                before = prefix.batch(batch)
                total += scalar(
                    cross_entropy_sum(self.job.forward, batch, before, with_gradient=False)
                )
                weight += batch.weight
                tokens += batch.trained_tokens
                self.show_progress("validation after iteration")
        loss = total / (weight or 1.0)
        place = self.position
        is_best = place.iteration > 0 and (place.best_loss is None or loss < place.best_loss)
        if is_best:
            place = replace(place, best_loss=loss, best_iteration=place.iteration, worse=0)
        elif place.iteration > 0:
            place = replace(place, worse=place.worse + 1)
        self.position = place
        self._tell(
            {
                "kind": "validation",
                "iteration": place.iteration,
                "iterations": self.job.iterations,
                "update": place.update,
                "loss": loss,
                "trained_tokens": tokens,
                "best_iteration": place.best_iteration,
                "validations_since_best": place.worse,
            }
        )
        return is_best

    def _tell(self, metric: Metric) -> None:
        self.metrics.add(metric)
        self.listener.metric(metric)

    def _micro_batches(
        self, split: TokenizedSplit, prefix: PrefixCache, rows: Sequence[int]
    ) -> Iterator[Batch]:
        limit_tokens = self.job.recipe.micro_batch_tokens
        return micro_batches(split, rows, prefix.shared_tokens, limit_tokens)

    def step(self, mini_batch: MiniBatch) -> None:
        """Train one mini-batch; update the weights when it completes its accumulation window."""
        self.job.model.train()
        first_seed = self.job.recipe.seed * 1_000_003 + mini_batch.iteration
        prefix = self.train_prefix
        batches = self._micro_batches(self.job.train_rows, prefix, mini_batch.rows)
        for index, batch in enumerate(batches):
            before = prefix.batch(batch)
            # Dropout depends on (seed, iteration, group) alone: a resumed run draws the same masks,
            # and so does one whose frozen layers, read again, drew first weights just now.
            mx.random.seed(first_seed * SEEDS_PER_ITERATION + index)
            loss = self.window.add(batch, before)
            self._count(batch, loss)
        now = time.perf_counter()
        self.position = replace(
            self.position,
            iteration=mini_batch.iteration,
            epoch=mini_batch.epoch,
            seconds=self.position.seconds + now - self._clock,
        )
        self._clock = now
        if self.window_ends():
            self._update()

    def _count(self, batch: Batch, loss: float) -> None:
        place = self.position
        finite = math.isfinite(loss)
        self.position = replace(
            place,
            loss_sum=place.loss_sum + (loss if finite else 0.0),
            loss_weight=place.loss_weight + (batch.weight if finite else 0.0),
            trained_tokens=place.trained_tokens + batch.trained_tokens,
            tokens=place.tokens + batch.tokens,
            padded_tokens=place.padded_tokens + batch.padded_tokens,
        )
        self._report_tokens += batch.tokens

    def window_ends(self) -> bool:
        """Say whether the weights are those of a whole number of updates."""
        iteration = self.position.iteration
        window = self.job.recipe.grad_accumulation_steps
        return iteration % window == 0 or iteration == self.job.iterations

    def _update(self) -> None:
        rows = self.window.rows
        update = self.window.update(self.rate(self.position.update))
        place = replace(self.position, update=self.position.update + 1)
        if update.applied:
            self.position = replace(place, gradient_norm=update.gradient_norm, skipped_in_a_row=0)
            return
        self.position = replace(
            place,
            skipped_updates=place.skipped_updates + 1,
            skipped_in_a_row=place.skipped_in_a_row + 1,
        )
        self._skipped(update, rows)

    def _skipped(self, update: Update, rows: tuple[int, ...]) -> None:
        """Tell of an update that was not made; GateFailed when too many follow each other."""
        place = self.position
        lines = [int(self.job.train_rows.lines[row]) for row in rows]
        self._tell(
            {
                "kind": "skipped",
                "iteration": place.iteration,
                "iterations": self.job.iterations,
                "update": place.update,
                "loss": update.loss,
                "gradient_norm": update.gradient_norm,
                "lines": lines,
            }
        )
        if place.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            return
        raise GateFailed(
            Fault(
                f"training, iteration {place.iteration}",
                f"the loss is {update.loss} and the gradient's norm {update.gradient_norm}, "
                f"{MAX_SKIPPED_IN_A_ROW} updates in a row "
                f"(train rows of lines {', '.join(map(str, lines))})",
                "lower train.learning_rate or set train.max_grad_norm; the last checkpoint is "
                "intact",
            )
        )

    def report(self) -> None:
        """Tell the loss since the last report and the pace."""
        now = time.perf_counter()
        elapsed = now - self._report_started
        place = self.position
        done = self._cost_done_at[place.iteration]
        left = place.seconds * (self._cost_done_at[-1] - done) / done
        self._tell(
            {
                "kind": "train",
                "iteration": place.iteration,
                "iterations": self.job.iterations,
                "epoch": place.epoch,
                "update": place.update,
                "updates": self.updates,
                "loss": place.loss_sum / place.loss_weight if place.loss_weight else math.nan,
                "learning_rate": self.rate(max(0, place.update - 1)),
                "gradient_norm": place.gradient_norm,
                "padding_share": 1 - place.tokens / place.padded_tokens,
                "tokens_per_second": self._report_tokens / elapsed,
                "trained_tokens": place.trained_tokens,
                "skipped_updates": place.skipped_updates,
                "peak_memory_bytes": int(mx.get_peak_memory()),
                "seconds": place.seconds,
                "seconds_left": left,
            }
        )
        self.position = replace(place, loss_sum=0.0, loss_weight=0.0, tokens=0, padded_tokens=0)
        self._report_started, self._report_tokens = now, 0

    def save(self) -> None:
        """Write a checkpoint of the position as it is, right after an update."""
        job = self.job
        save_checkpoint(
            job.folder / CHECKPOINTS,
            self.position,
            job.model,
            self.optimizer,
            job.adapter_config,
            job.inputs,
            job.recipe.keep_checkpoints,
        )

    def show_progress(self, doing: str = "iteration") -> None:
        """Say where the run is; that is its sign of life as well."""
        done, total = self._cost_done_at[self.position.iteration], self._cost_done_at[-1]
        text = f"{doing} {self.position.iteration} of {self.job.iterations}"
        self.listener.progress(done, total, text)


def train(job: TrainingJob, listener: Listener) -> TrainingResult:
    """Run `job` from its last checkpoint, or from the start, to the end.

    The frozen layers' weights are gone afterwards if their outputs could be kept: load the model
    again to use it. Raises Interrupted after a checkpoint when `listener.stop_requested` says so,
    SegmentOver after `train.segment_steps` mini-batches, GateFailed when the loss stops being a
    number.
    """
    mx.reset_peak_memory()
    run = _Run(job, listener)
    try:
        _fill_prefix(run)
        if run.metrics.first("validation") is None:
            run.validate()
        run.show_progress()
        _iterate(run)
    finally:
        run.metrics.close()
    return _result(run)


def _fill_prefix(run: _Run) -> None:
    for title, cache in (("rows", run.train_prefix), ("validation", run.validation_prefix)):

        def on_rows(done: int, of: int, title: str = title) -> None:
            run.listener.progress(done, of, f"frozen layers, {title}: {done} of {of}")

        cache.fill(on_rows)
    if run.train_prefix.is_complete and run.validation_prefix.is_complete:
        run.job.forward.release_frozen()
        mx.clear_cache()
    run.start_clock()


def _iterate(run: _Run) -> None:
    recipe = run.job.recipe
    save_due = validation_due = False
    begun_at = run.position.iteration
    for mini_batch in run.plan(run.position.iteration):
        run.step(mini_batch)
        iteration = run.position.iteration
        last = iteration == run.job.iterations
        if last or iteration % recipe.steps_per_report == 0:
            run.report()
        run.show_progress()
        # Between two updates there are gradients in flight: validation and checkpoint wait for the
        # boundary, so that what is measured is what can be saved.
        validation_due = validation_due or run.validates_at(iteration)
        stop = run.listener.stop_requested()
        segment = recipe.segment_steps
        segment_over = segment is not None and iteration - begun_at >= segment and not last
        save_due = save_due or stop or last or segment_over or iteration % recipe.save_every == 0
        if run.window_ends():
            if validation_due:
                save_due = run.validate() or save_due
            if save_due:
                run.save()
            save_due = validation_due = False
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


def _result(run: _Run) -> TrainingResult:
    first, final = run.metrics.first("validation"), run.metrics.last("validation")
    report = run.metrics.last("train")
    assert first is not None and final is not None and report is not None
    best = run.position.best_loss
    per_epoch = -(-len(run.job.train_rows) // run.job.recipe.batch_size)
    return TrainingResult(
        iterations=run.position.iteration,
        updates=run.position.update,
        epochs=run.position.iteration / per_epoch,
        first_validation_loss=first["loss"],
        final_validation_loss=final["loss"],
        final_train_loss=report["loss"],
        trained_tokens=run.position.trained_tokens,
        seconds=run.position.seconds,
        peak_memory_bytes=int(mx.get_peak_memory()),
        skipped_updates=run.position.skipped_updates,
        best_validation_loss=final["loss"] if best is None else best,
        best_iteration=run.position.best_iteration,
    )
