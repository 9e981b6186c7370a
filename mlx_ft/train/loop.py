"""The training run: every mini-batch, report, validation and checkpoint, in order.

Does: train an adapter on tokenized rows, exactly (see `losses.py`), and leave metrics, checkpoints
and the adapter in the stage folder; continue from the last checkpoint. Does not: render data,
merge, or print (it tells a listener).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_map

from mlx_ft.errors import Fault, GateFailed, Interrupted, RecipeError
from mlx_ft.inference import scalar
from mlx_ft.recipe import TrainRecipe
from mlx_ft.tokens import TokenizedSplit
from mlx_ft.train.adapters import AdapterShape
from mlx_ft.train.batches import MiniBatch, plan_run, plan_validation, total_updates
from mlx_ft.train.checkpoints import (
    Position,
    complete_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from mlx_ft.train.forward import Forward
from mlx_ft.train.losses import Batch, cross_entropy_sum, make_batch
from mlx_ft.train.metrics import METRICS_FILE, Metric, MetricsFile
from mlx_ft.train.prefix import PrefixCache
from mlx_ft.train.schedules import learning_rate_at
from mlx_ft.train.shared_start import choose_start

CHECKPOINTS = "checkpoints"
OPTIMIZERS = {
    "adam": optimizers.Adam,
    "adamw": optimizers.AdamW,
    "muon": optimizers.Muon,
    "sgd": optimizers.SGD,
    "adafactor": optimizers.Adafactor,
    "lion": optimizers.Lion,
}
# A trained token costs about three forward passes of it (forward, and twice that backward).
TRAIN_COST, VALIDATION_COST = 3, 1


@dataclass(frozen=True)
class TrainingJob:
    """All that one run trains: the model with its adapter, the rows, and where results go.

    `folder` is the stage folder; `inputs` the hash that a checkpoint must carry to be continued.
    """

    model: nn.Module
    forward: Forward
    shape: AdapterShape
    adapter_config: dict[str, Any]
    train_rows: TokenizedSplit
    validation_rows: TokenizedSplit
    recipe: TrainRecipe
    iterations: int
    folder: Path
    inputs: str
    prefix_limit_bytes: int


@dataclass(frozen=True)
class Listener:
    """Who wants to know: `metric` gets every report and validation, `progress` (done, of, text) in
    cost units, and `stop_requested` is asked at every step boundary."""

    metric: Callable[[Metric], None]
    progress: Callable[[float, float, str], None]
    stop_requested: Callable[[], bool]


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to; losses are per trained token, in nats."""

    iterations: int
    updates: int
    epochs: float
    first_validation_loss: float
    final_validation_loss: float
    final_train_loss: float
    trained_tokens: int
    seconds: float
    peak_memory_bytes: int


def build_optimizer(train: TrainRecipe) -> optimizers.Optimizer:
    """Return the recipe's optimizer; RecipeError when it does not take the options."""
    try:
        return OPTIMIZERS[train.optimizer](
            learning_rate=train.learning_rate, **train.optimizer_config
        )
    except TypeError as error:
        raise RecipeError(
            Fault("train.optimizer_config", str(error), f"see mlx.optimizers.{train.optimizer}")
        ) from error


def _prefix_cache(job: TrainingJob, rows: TokenizedSplit, limit_bytes: int) -> PrefixCache:
    job.model.eval()
    start = choose_start(job.model, job.forward, rows)
    return PrefixCache(job.forward, rows, limit_bytes, start)


class _Run:
    """The moving parts of one run, between `position` and the end."""

    def __init__(self, job: TrainingJob, listener: Listener) -> None:
        self.job = job
        self.listener = listener
        self.updates = total_updates(job.iterations, job.recipe.grad_accumulation_steps)
        self.rate = learning_rate_at(job.recipe.lr_schedule, job.recipe.learning_rate, self.updates)
        self.optimizer = build_optimizer(job.recipe)
        self.optimizer.init(job.model.trainable_parameters())
        self.train_prefix = _prefix_cache(job, job.train_rows, job.prefix_limit_bytes)
        self.validation_prefix = _prefix_cache(
            job, job.validation_rows, job.prefix_limit_bytes // 4
        )
        self.position = self._resume()
        self.metrics = MetricsFile(job.folder / METRICS_FILE, self.position.iteration)
        self.validation_batches = plan_validation(
            job.validation_rows.lengths, job.recipe.batch_size, job.recipe.val_batches
        )
        self._loss_and_gradient = nn.value_and_grad(job.model, self._loss)
        self._gradient: Any = None
        self._window_tokens = 0
        self._report_started = time.perf_counter()
        self._report_tokens = 0
        self._clock = time.perf_counter()
        self._count_cost()

    def _resume(self) -> Position:
        checkpoints = complete_checkpoints(self.job.folder / CHECKPOINTS, self.job.inputs)
        if not checkpoints:
            return Position()
        return restore_checkpoint(checkpoints[-1], self.job.model, self.optimizer)

    def _loss(self, batch: Batch, prefix: mx.array, shared_tokens: int) -> mx.array:
        return cross_entropy_sum(self.job.forward, batch, prefix, shared_tokens)

    def _plan(self, start: int) -> Iterator[MiniBatch]:
        recipe, rows = self.job.recipe, self.job.train_rows
        return plan_run(rows.lengths, recipe.batch_size, recipe.seed, self.job.iterations, start)

    def _count_cost(self) -> None:
        """Add up the work of the whole run, known from the plan, so that time left is honest."""
        lengths = self.job.train_rows.lengths
        done_at = [0.0]
        for mini_batch in self._plan(0):
            padded = max(int(lengths[row]) for row in mini_batch.rows) * len(mini_batch.rows)
            cost = TRAIN_COST * padded + self._validation_cost(mini_batch.iteration)
            done_at.append(done_at[-1] + cost)
        self._cost_done_at = done_at

    def _validation_cost(self, iteration: int) -> float:
        if not self._validates_at(iteration):
            return 0.0
        rows = [row for batch in self.validation_batches for row in batch]
        return VALIDATION_COST * float(self.job.validation_rows.lengths[rows].sum())

    def _validates_at(self, iteration: int) -> bool:
        return iteration == self.job.iterations or iteration % self.job.recipe.steps_per_eval == 0

    def validate(self) -> None:
        """Measure the weights as they are on the fixed validation set, per trained token."""
        self.job.model.eval()
        total, tokens = 0.0, 0
        for rows in self.validation_batches:
            batch = make_batch(self.job.validation_rows, rows)
            prefix = self.validation_prefix
            loss = self._loss(batch, prefix.batch(batch), prefix.shared_tokens)
            total += scalar(loss)
            tokens += batch.trained_tokens
        metric = {
            "kind": "validation",
            "iteration": self.position.iteration,
            "iterations": self.job.iterations,
            "update": self.position.update,
            "loss": total / max(1, tokens),
            "trained_tokens": tokens,
        }
        self.metrics.add(metric)
        self.listener.metric(metric)

    def step(self, mini_batch: MiniBatch) -> None:
        """Train one mini-batch; update the weights when it completes its accumulation window."""
        self.job.model.train()
        # Dropout depends on (seed, iteration) alone, so a resumed run draws the same masks.
        mx.random.seed(self.job.recipe.seed * 1_000_003 + mini_batch.iteration)
        batch = make_batch(self.job.train_rows, mini_batch.rows)
        prefix = self.train_prefix
        loss, gradient = self._loss_and_gradient(batch, prefix.batch(batch), prefix.shared_tokens)
        if self._gradient is not None:
            gradient = tree_map(mx.add, self._gradient, gradient)
        mx.eval(loss, gradient)
        self._require_finite(scalar(loss), mini_batch)
        self._gradient = gradient
        self._window_tokens += batch.trained_tokens
        self._report_tokens += batch.tokens
        now = time.perf_counter()
        self.position = replace(
            self.position,
            iteration=mini_batch.iteration,
            loss_sum=self.position.loss_sum + scalar(loss),
            loss_tokens=self.position.loss_tokens + batch.trained_tokens,
            trained_tokens=self.position.trained_tokens + batch.trained_tokens,
            seconds=self.position.seconds + now - self._clock,
        )
        self._clock = now
        if self._window_ends():
            self._update()

    def _require_finite(self, loss: float, mini_batch: MiniBatch) -> None:
        if math.isfinite(loss):
            return
        lines = ", ".join(str(int(self.job.train_rows.lines[row])) for row in mini_batch.rows)
        raise GateFailed(
            Fault(
                f"training, iteration {mini_batch.iteration}",
                f"the loss is {loss} (train rows of lines {lines})",
                "lower train.learning_rate; the last checkpoint is intact",
            )
        )

    def _window_ends(self) -> bool:
        iteration = self.position.iteration
        window = self.job.recipe.grad_accumulation_steps
        return iteration % window == 0 or iteration == self.job.iterations

    def _update(self) -> None:
        gradient = tree_map(lambda g: g / self._window_tokens, self._gradient)
        self.optimizer.learning_rate = self.rate(self.position.update)
        self.optimizer.update(self.job.model, gradient)
        mx.eval(self.job.model.trainable_parameters(), self.optimizer.state)
        self._gradient, self._window_tokens = None, 0
        self.position = replace(self.position, update=self.position.update + 1)

    def report(self) -> None:
        """Tell the loss since the last report and the pace."""
        now = time.perf_counter()
        elapsed = now - self._report_started
        done = self._cost_done_at[self.position.iteration]
        left = self.position.seconds * (self._cost_done_at[-1] - done) / done
        metric = {
            "kind": "train",
            "iteration": self.position.iteration,
            "iterations": self.job.iterations,
            "update": self.position.update,
            "updates": self.updates,
            "loss": self.position.loss_sum / self.position.loss_tokens,
            "learning_rate": self.rate(max(0, self.position.update - 1)),
            "tokens_per_second": self._report_tokens / elapsed,
            "trained_tokens": self.position.trained_tokens,
            "peak_memory_bytes": int(mx.get_peak_memory()),
            "seconds": self.position.seconds,
            "seconds_left": left,
        }
        self.metrics.add(metric)
        self.listener.metric(metric)
        self.position = replace(self.position, loss_sum=0.0, loss_tokens=0)
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

    def show_progress(self) -> None:
        done, total = self._cost_done_at[self.position.iteration], self._cost_done_at[-1]
        text = f"iteration {self.position.iteration} of {self.job.iterations}"
        self.listener.progress(done, total, text)


def train(job: TrainingJob, listener: Listener) -> TrainingResult:
    """Run `job` from its last checkpoint, or from the start, to the end.

    Raises Interrupted after a checkpoint when `listener.stop_requested` says so, GateFailed when
    the loss stops being a number.
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
    run._clock = time.perf_counter()


def _iterate(run: _Run) -> None:
    recipe = run.job.recipe
    save_due = False
    for mini_batch in run._plan(run.position.iteration):
        run.step(mini_batch)
        iteration = run.position.iteration
        last = iteration == run.job.iterations
        if last or iteration % recipe.steps_per_report == 0:
            run.report()
        if run._validates_at(iteration):
            run.validate()
        run.show_progress()
        stop = run.listener.stop_requested()
        save_due = save_due or stop or last or iteration % recipe.save_every == 0
        # Between two updates there are gradients in flight: the checkpoint waits for the boundary.
        if save_due and run._window_ends():
            run.save()
            save_due = False
            if stop and not last:
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
    )


def result_info(result: TrainingResult, shape: AdapterShape, compute: str, note: str) -> Metric:
    """Return what the training stage hands over, as plain JSON."""
    return {
        **asdict(result),
        "trainable_parameters": shape.trainable_parameters,
        "total_parameters": shape.total_parameters,
        "num_layers": shape.num_layers,
        "adapted_layers": list(shape.modules),
        "compute": compute,
        "fast_path": note,
    }
