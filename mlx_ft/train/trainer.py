"""The state of a training run, and the steps that change it.

Does: one mini-batch, update, report or checkpoint at a time, from the last checkpoint on. Does not:
decide when (`plan.py`, `loop.py`), or measure (`selection.py`).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_ft.data.tokens import TokenizedSplit
from mlx_ft.errors import Fault, GateFailed
from mlx_ft.runs.folder import verify_files
from mlx_ft.train.accumulation import GradientWindow, Update, build_optimizer, micro_batches
from mlx_ft.train.batches import MiniBatch, total_updates
from mlx_ft.train.checkpoint_list import CHECKPOINTS, complete_checkpoints
from mlx_ft.train.checkpoints import Position, restore_checkpoint, save_checkpoint
from mlx_ft.train.contract import Listener, TrainingJob
from mlx_ft.train.metrics import METRICS_FILE, Metric, MetricsFile
from mlx_ft.train.numerics.losses import Batch, cross_entropy_sum
from mlx_ft.train.numerics.prefix_cache import PrefixCache, content_key
from mlx_ft.train.numerics.prefix_store import Place
from mlx_ft.train.numerics.shared_start import choose_start
from mlx_ft.train.plan import Course
from mlx_ft.train.schedules import learning_rate_at

# Room for the groups of rows that a mini-batch is cut into.
SEEDS_PER_ITERATION = 1 << 12
# Updates in a row whose loss or gradient is not finite: one may be a row's fault, more are not.
MAX_SKIPPED_IN_A_ROW = 3
SMALLER_STEPS = "lower train.learning_rate or set train.max_grad_norm"


def prefix_caches(job: TrainingJob) -> tuple[PrefixCache, PrefixCache]:
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


class Run:
    """The moving parts of one run, between `position` and the end."""

    def __init__(self, job: TrainingJob, listener: Listener) -> None:
        self.job = job
        self.listener = listener
        self.updates = total_updates(job.iterations, job.recipe.grad_accumulation_steps)
        self.rate = learning_rate_at(job.recipe.lr_schedule, job.recipe.learning_rate, self.updates)
        self.optimizer = build_optimizer(job.recipe)
        self.optimizer.init(job.model.trainable_parameters())
        self.train_prefix, self.validation_prefix = job.prefixes or prefix_caches(job)
        self.position = self._resume()
        self.metrics = MetricsFile(job.folder / METRICS_FILE, self.position.iteration)
        self.course = Course(job)
        self.window = GradientWindow(
            job.model, self._loss, self.optimizer, job.recipe.max_grad_norm
        )
        self._report_tokens, self._report_seconds, self.reported_at = 0, 0.0, 0
        self.start_clock()

    def start_clock(self) -> None:
        """Begin to count the run's time; what came before was not training."""
        self._clock = time.perf_counter()

    def take_stock(self) -> None:
        """Add the time since it was last counted, and what memory was needed, to the position."""
        now, place = time.perf_counter(), self.position
        self.position = replace(
            place,
            seconds=place.seconds + now - self._clock,
            peak_memory_bytes=max(place.peak_memory_bytes, int(mx.get_peak_memory())),
        )
        self._clock = now

    def _resume(self) -> Position:
        """Go back to the newest checkpoint whose files are what its manifest says."""
        folder, say = self.job.folder / CHECKPOINTS, self.listener.say
        for path in reversed(complete_checkpoints(folder, self.job.inputs)):
            damaged = verify_files(path)
            if not damaged:
                say(f"going on from the checkpoint of iteration {int(path.name)}")
                return restore_checkpoint(path, self.job.model, self.optimizer)
            say(f"{damaged[0].where}: {damaged[0].found}; the checkpoint is removed")
            shutil.rmtree(path)
        if folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir()):
            say("no checkpoint here is whole and of this recipe: training begins anew")
        return Position()

    def _loss(self, batch: Batch, prefix: mx.array) -> mx.array:
        return cross_entropy_sum(self.job.forward, batch, prefix)

    def tell(self, metric: Metric) -> None:
        """Write a metric down, and tell the listener."""
        self.metrics.add(metric)
        self.listener.metric(metric)

    def micro_batches(
        self, split: TokenizedSplit, prefix: PrefixCache, rows: Sequence[int]
    ) -> Iterator[Batch]:
        """Yield what goes through the model at a time."""
        limit_tokens = self.job.recipe.micro_batch_tokens
        return micro_batches(split, rows, prefix.shared_tokens, limit_tokens)

    def step(self, mini_batch: MiniBatch) -> None:
        """Train one mini-batch; update the weights when it completes its accumulation window."""
        started = time.perf_counter()
        self.job.model.train()
        first_seed = self.job.recipe.seed * 1_000_003 + mini_batch.iteration
        prefix = self.train_prefix
        batches = self.micro_batches(self.job.train_rows, prefix, mini_batch.rows)
        for index, batch in enumerate(batches):
            before = prefix.batch(batch)
            # Dropout depends on (seed, iteration, group) alone: a resumed run draws the same masks,
            # and so does one whose frozen layers, read again, drew first weights just now.
            mx.random.seed(first_seed * SEEDS_PER_ITERATION + index)
            loss = self.window.add(batch, before)
            self._count(batch, loss)
        self.position = replace(
            self.position, iteration=mini_batch.iteration, epoch=mini_batch.epoch
        )
        if self.window_ends():
            self._update()
        self._report_seconds += time.perf_counter() - started
        self.take_stock()

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
        return self.course.window_ends(self.position.iteration)

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
        self.tell(
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
                SMALLER_STEPS,
            )
        )

    def report(self) -> None:
        """Tell the loss since the last report and the pace."""
        place = self.position
        done = self.course.work_trained_at[place.iteration]
        left = place.seconds * (self.course.work_done_at[-1] - done) / done
        self.tell(
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
                "tokens_per_second": self._report_tokens / self._report_seconds,
                "trained_tokens": place.trained_tokens,
                "skipped_updates": place.skipped_updates,
                "peak_memory_bytes": place.peak_memory_bytes,
                "seconds": place.seconds,
                "seconds_left": left,
            }
        )
        self.position = replace(place, loss_sum=0.0, loss_weight=0.0, tokens=0, padded_tokens=0)
        self._report_tokens, self._report_seconds = 0, 0.0
        self.reported_at = place.iteration

    def save(self) -> None:
        """Write a checkpoint of the position as it is, right after an update."""
        job = self.job
        self.take_stock()
        self.metrics.flush_to_disk()
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
        done, total = (
            self.course.work_done_at[self.position.iteration],
            self.course.work_done_at[-1],
        )
        text = f"{doing} {self.position.iteration} of {self.job.iterations}"
        self.listener.progress(done, total, text)
