"""State of a training, and the steps that change it.

Does: one mini-batch, update, report or checkpoint at a time, from the last checkpoint on. Does not:
decide when (`plan.py`, `loop.py`), or measure (`selection.py`).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_ft.data.tokens import TokenizedSplit
from mlx_ft.engine.load import scalar
from mlx_ft.errors import Fault, GateFailed
from mlx_ft.runs.folder import verify_files
from mlx_ft.system.console import Console, Progress
from mlx_ft.train.accumulation import (
    GradientWindow,
    StepForm,
    Update,
    build_optimizer,
    micro_batches,
)
from mlx_ft.train.batches import MiniBatch, total_updates
from mlx_ft.train.checkpoint_list import CHECKPOINTS, complete_checkpoints
from mlx_ft.train.checkpoints import Position, restore_checkpoint, save_checkpoint
from mlx_ft.train.contract import TrainingInputs
from mlx_ft.train.metrics import METRICS_FILE, Metric, MetricsFile, metric_line
from mlx_ft.train.numerics.batch import Batch
from mlx_ft.train.numerics.losses import cross_entropy_sum
from mlx_ft.train.numerics.prefix_cache import PrefixCache, content_key
from mlx_ft.train.numerics.prefix_store import Place
from mlx_ft.train.numerics.shared_start import choose_start
from mlx_ft.train.plan import Plan
from mlx_ft.train.schedules import learning_rate_at

# Upper bound of the groups of rows in one mini-batch, each of which has a seed.
SEEDS_PER_ITERATION = 1 << 12
# Updates in a row whose loss or gradient is not finite: one may be a row's fault, more are not.
MAX_SKIPPED_IN_A_ROW = 3
SMALLER_STEPS = "lower train.learning_rate or set train.max_grad_norm"


def prefix_caches(inputs: TrainingInputs) -> tuple[PrefixCache, PrefixCache]:
    """Return the caches of training and validation rows, not filled yet."""
    inputs.model.eval()
    splits = (inputs.train_rows, inputs.validation_rows)
    start = choose_start(inputs.model, inputs.forward, splits)

    def cache(rows: TokenizedSplit, limit_bytes: int, name: str) -> PrefixCache:
        place = None
        if inputs.prefix_folder is not None and inputs.forward.frozen_layers:
            start_tokens = 0 if start is None else start.tokens
            key = content_key(rows, f"{inputs.computed_by}, start {start_tokens}")
            place = Place(inputs.prefix_folder, key)
        return PrefixCache(inputs.forward, rows, limit_bytes, start, place, name)

    limit = inputs.prefix_limit_bytes
    return (
        cache(inputs.train_rows, limit, "rows"),
        cache(inputs.validation_rows, limit // 4, "validation"),
    )


class Trainer:
    """State of one training, between `position` and the end.

    progress: shows the share of the work that is done; its total is 1.
    on_metric: receives every metric.
    """

    def __init__(
        self,
        inputs: TrainingInputs,
        console: Console,
        progress: Progress,
        on_metric: Callable[[Metric], None] = lambda metric: None,
    ) -> None:
        recipe = inputs.recipe
        self.inputs = inputs
        self.console = console
        self.progress = progress
        self._on_metric = on_metric
        self.updates = total_updates(inputs.iterations, recipe.grad_accumulation_steps)
        self.rate = learning_rate_at(recipe.lr_schedule, recipe.learning_rate, self.updates)
        self.optimizer = build_optimizer(recipe)
        self.optimizer.init(inputs.model.trainable_parameters())
        self.train_prefix, self.validation_prefix = inputs.prefixes or prefix_caches(inputs)
        self.position = self._resume()
        self.metrics = MetricsFile(inputs.folder / METRICS_FILE, self.position.iteration)
        self.plan = Plan(inputs)
        form = StepForm.of(recipe, inputs.forward)
        self.window = GradientWindow(
            inputs.model, self._loss, self.optimizer, recipe.max_grad_norm, form
        )
        self._report_tokens, self._report_seconds, self.reported_at = 0, 0.0, 0
        # (weight, loss) of micro-batches since the last update or report
        self._uncounted: list[tuple[float, mx.array]] = []
        self.start_clock()

    def start_clock(self) -> None:
        """Begin to count the training's time; the work before is not training."""
        self._clock = time.perf_counter()

    def _count_time_and_memory(self) -> None:
        """Add the time since the last count, and the peak of memory, to the position."""
        now, position = time.perf_counter(), self.position
        self.position = replace(
            position,
            seconds=position.seconds + now - self._clock,
            peak_memory_bytes=max(position.peak_memory_bytes, int(mx.get_peak_memory())),
        )
        self._clock = now

    def _resume(self) -> Position:
        """Restore the newest checkpoint whose files match its manifest."""
        folder, say = self.inputs.folder / CHECKPOINTS, self.console.say
        for path in reversed(complete_checkpoints(folder, self.inputs.inputs_hash)):
            damaged = verify_files(path)
            if not damaged:
                say(f"going on from the checkpoint of iteration {int(path.name)}")
                return restore_checkpoint(path, self.inputs.model, self.optimizer)
            say(f"{damaged[0].where}: {damaged[0].found}; the checkpoint is removed")
            shutil.rmtree(path)
        if folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir()):
            say("no checkpoint here is whole and of this recipe: training begins anew")
        return Position()

    def _loss(self, batch: Batch, prefix: mx.array) -> mx.array:
        return cross_entropy_sum(self.inputs.forward, batch, prefix)

    def log(self, metric: Metric) -> None:
        """Write a metric to metrics.jsonl and say it."""
        self.metrics.add(metric)
        self._on_metric(metric)
        self.console.say(metric_line(metric))

    def micro_batches(
        self, split: TokenizedSplit, prefix: PrefixCache, rows: Sequence[int]
    ) -> Iterator[Batch]:
        """Yield the rows in batches that go through the model at a time."""
        limit_tokens = self.inputs.recipe.micro_batch_tokens
        return micro_batches(split, rows, prefix.shared_tokens, limit_tokens)

    def step(self, mini_batch: MiniBatch) -> None:
        """Train one mini-batch; update the weights when it completes its accumulation window."""
        started = time.perf_counter()
        self.inputs.model.train()
        first_seed = self.inputs.recipe.seed * 1_000_003 + mini_batch.iteration
        prefix = self.train_prefix
        batches = self.micro_batches(self.inputs.train_rows, prefix, mini_batch.rows)
        for index, batch in enumerate(batches):
            before = prefix.batch(batch)
            # Dropout depends on (seed, iteration, group) alone: a resumed run draws the same masks,
            # and so does one whose frozen layers, read again, drew first weights just now.
            mx.random.seed(first_seed * SEEDS_PER_ITERATION + index)
            self._count(batch)
            self._uncounted.append((batch.weight, self.window.add(batch, before)))
        self.position = replace(
            self.position, iteration=mini_batch.iteration, epoch=mini_batch.epoch
        )
        if self.window_ends():
            self._update()
        self._report_seconds += time.perf_counter() - started
        self._count_time_and_memory()

    def _count(self, batch: Batch) -> None:
        position = self.position
        self.position = replace(
            position,
            trained_tokens=position.trained_tokens + batch.trained_tokens,
            tokens=position.tokens + batch.tokens,
            padded_tokens=position.padded_tokens + batch.padded_tokens,
        )
        self._report_tokens += batch.tokens

    def _count_losses(self) -> None:
        """Add the losses that are finite to the position; waits for those still computed."""
        for weight, array in self._uncounted:
            loss, position = scalar(array), self.position
            if math.isfinite(loss):
                self.position = replace(
                    position,
                    loss_sum=position.loss_sum + loss,
                    loss_weight=position.loss_weight + weight,
                )
        self._uncounted.clear()

    def window_ends(self) -> bool:
        """Return whether the weights are those of a whole number of updates."""
        return self.plan.window_ends(self.position.iteration)

    def _update(self) -> None:
        rows = self.window.rows
        update = self.window.update(self.rate(self.position.update))
        self._count_losses()
        position = replace(self.position, update=self.position.update + 1)
        if update.applied:
            self.position = replace(
                position, gradient_norm=update.gradient_norm, skipped_in_a_row=0
            )
            return
        self.position = replace(
            position,
            skipped_updates=position.skipped_updates + 1,
            skipped_in_a_row=position.skipped_in_a_row + 1,
        )
        self._skipped(update, rows)

    def _skipped(self, update: Update, rows: tuple[int, ...]) -> None:
        """Log a skipped update; raise GateFailed after too many in a row."""
        position = self.position
        lines = [int(self.inputs.train_rows.lines[row]) for row in rows]
        self.log(
            {
                "kind": "skipped",
                "iteration": position.iteration,
                "iterations": self.inputs.iterations,
                "update": position.update,
                "loss": update.loss,
                "gradient_norm": update.gradient_norm,
                "lines": lines,
            }
        )
        if position.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            return
        raise GateFailed(
            Fault(
                f"training, iteration {position.iteration}",
                f"the loss is {update.loss} and the gradient's norm {update.gradient_norm}, "
                f"{MAX_SKIPPED_IN_A_ROW} updates in a row "
                f"(train rows of lines {', '.join(map(str, lines))})",
                SMALLER_STEPS,
            )
        )

    def report(self) -> None:
        """Log the loss since the last report, and the pace."""
        self._count_losses()
        position = self.position
        done = self.plan.work_trained_at[position.iteration]
        left = position.seconds * (self.plan.work_done_at[-1] - done) / done
        self.log(
            {
                "kind": "train",
                "iteration": position.iteration,
                "iterations": self.inputs.iterations,
                "epoch": position.epoch,
                "update": position.update,
                "updates": self.updates,
                "loss": position.loss_sum / position.loss_weight
                if position.loss_weight
                else math.nan,
                "learning_rate": self.rate(max(0, position.update - 1)),
                "gradient_norm": position.gradient_norm,
                "padding_share": 1 - position.tokens / position.padded_tokens,
                "tokens_per_second": self._report_tokens / self._report_seconds,
                "trained_tokens": position.trained_tokens,
                "skipped_updates": position.skipped_updates,
                "peak_memory_bytes": position.peak_memory_bytes,
                "seconds": position.seconds,
                "seconds_left": left,
            }
        )
        self.position = replace(position, loss_sum=0.0, loss_weight=0.0, tokens=0, padded_tokens=0)
        self._report_tokens, self._report_seconds = 0, 0.0
        self.reported_at = position.iteration

    def save(self) -> None:
        """Write a checkpoint of the present position, right after an update."""
        inputs = self.inputs
        self._count_time_and_memory()
        self.metrics.flush_to_disk()
        save_checkpoint(
            inputs.folder / CHECKPOINTS,
            self.position,
            inputs.model,
            self.optimizer,
            inputs.adapter_config,
            inputs.inputs_hash,
            inputs.recipe.keep_checkpoints,
        )

    def show_progress(self, doing: str = "iteration") -> None:
        """Show the share of the work that is done, and the present work."""
        iteration, work = self.position.iteration, self.plan.work_done_at
        text = f"{doing} {iteration} of {self.inputs.iterations}"
        self.progress.update(work[iteration] / (work[-1] or 1.0), text)

    def progress_of(self, doing: str) -> Progress:
        """Return the progress of work between two iterations, which shows the training's own."""
        return _WorkBetweenIterations(self, doing)


class _WorkBetweenIterations:
    """Progress of work between two iterations: each update shows the training's place again."""

    def __init__(self, trainer: Trainer, doing: str) -> None:
        self._trainer = trainer
        self._doing = doing

    def update(self, done: float, text: str = "") -> None:
        self._trainer.show_progress(self._doing)
