"""What a run does when: its mini-batches, what is due after which of them, and the work in it.

Pure functions of the job. Does not: train or measure.
"""

from __future__ import annotations

from collections.abc import Iterator

from mlx_ft.recipe.schema import SelectRecipe
from mlx_ft.train.batches import MiniBatch, plan_run, plan_validation
from mlx_ft.train.contract import TrainingJob

# A trained token costs about three forward passes of it (forward, and twice that backward).
TRAIN_COST, VALIDATION_COST = 3, 1


class Course:
    """The way of one job from its first mini-batch to its last."""

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.validation_batches = plan_validation(
            job.validation_rows.lengths, job.recipe.batch_size, job.recipe.val_batches
        )
        self.work_trained_at, self.work_done_at = self._work()

    @property
    def _select(self) -> SelectRecipe:
        return self.job.recipe.select

    def plan(self, start: int) -> Iterator[MiniBatch]:
        """Return the mini-batches after iteration `start`."""
        job = self.job
        batch_size, seed = job.recipe.batch_size, job.recipe.seed
        rows = len(job.train_rows)
        return plan_run(rows, batch_size, seed, job.iterations, start, job.shuffle)

    def selects_at(self, iteration: int) -> bool:
        """Say whether the weights are compared with the best so far after this iteration."""
        if self._select.by is None:
            return False
        every = self._select.every or self.job.recipe.steps_per_eval
        return iteration == self.job.iterations or iteration % every == 0

    def validates_at(self, iteration: int) -> bool:
        """Say whether a validation is due after this iteration; each comparison wants one."""
        due = iteration == self.job.iterations or iteration % self.job.recipe.steps_per_eval == 0
        return due or self.selects_at(iteration)

    def window_ends(self, iteration: int) -> bool:
        """Say whether the weights are those of a whole number of updates."""
        window = self.job.recipe.grad_accumulation_steps
        return iteration % window == 0 or iteration == self.job.iterations

    def _work(self) -> tuple[list[float], list[float]]:
        """Return the work up to each iteration, known from the plan, so that time left is honest:
        before, and after, the validations and questions that follow it.

        In forward passes of a token.
        """
        lengths = self.job.train_rows.lengths
        rows = [row for batch in self.validation_batches for row in batch]
        validation = VALIDATION_COST * float(self.job.validation_rows.lengths[rows].sum())
        asking = 0.0 if self.job.judge is None else VALIDATION_COST * self.job.judge.tokens
        trained_at, done_at = [0.0], [0.0]
        for mini_batch in self.plan(0):
            training = TRAIN_COST * float(lengths[list(mini_batch.rows)].sum())
            trained_at.append(done_at[-1] + training)
            measuring = validation * self.validates_at(mini_batch.iteration)
            measuring += asking * self.selects_at(mini_batch.iteration)
            done_at.append(trained_at[-1] + measuring)
        return trained_at, done_at
