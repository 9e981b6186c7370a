"""Plan of a training: its mini-batches, when to validate and select, and the work in it.

Pure functions of the inputs. Does not: train or measure.
"""

from __future__ import annotations

from collections.abc import Iterator

from mlx_ft.recipe.schema import SelectRecipe
from mlx_ft.train.batches import MiniBatch, plan_run, plan_validation
from mlx_ft.train.contract import TrainingInputs

# A trained token costs about three forward passes of it (forward, and twice that backward).
TRAIN_COST, VALIDATION_COST = 3, 1


class Plan:
    """Plan of one training, from its first mini-batch to its last.

    validation_batches: rows of each mini-batch of the fixed validation set.
    work_trained_at, work_done_at: work up to each iteration, without and with the validations and
        questions that follow it (forward passes of a token).
    """

    def __init__(self, inputs: TrainingInputs) -> None:
        self.inputs = inputs
        self.validation_batches = plan_validation(
            inputs.validation_rows.lengths, inputs.recipe.batch_size, inputs.recipe.val_batches
        )
        self.work_trained_at, self.work_done_at = self._work()

    @property
    def _select(self) -> SelectRecipe:
        return self.inputs.recipe.select

    def mini_batches(self, start: int) -> Iterator[MiniBatch]:
        """Return the mini-batches after iteration `start`."""
        inputs = self.inputs
        batch_size, seed = inputs.recipe.batch_size, inputs.recipe.seed
        rows = len(inputs.train_rows)
        return plan_run(rows, batch_size, seed, inputs.iterations, start, inputs.shuffle)

    def selects_at(self, iteration: int) -> bool:
        """Return whether the weights are compared with the best so far after this iteration."""
        if self._select.by is None:
            return False
        every = self._select.every or self.inputs.recipe.steps_per_eval
        return iteration == self.inputs.iterations or iteration % every == 0

    def validates_at(self, iteration: int) -> bool:
        """Return whether a validation is due after this iteration; each comparison needs one."""
        every = self.inputs.recipe.steps_per_eval
        due = iteration == self.inputs.iterations or iteration % every == 0
        return due or self.selects_at(iteration)

    def window_ends(self, iteration: int) -> bool:
        """Return whether the weights are those of a whole number of updates."""
        window = self.inputs.recipe.grad_accumulation_steps
        return iteration % window == 0 or iteration == self.inputs.iterations

    def _work(self) -> tuple[list[float], list[float]]:
        """Return the work up to each iteration, before and after the measurements that follow it.

        It is known from the plan, so that the estimated time left is honest.
        """
        lengths, judge = self.inputs.train_rows.lengths, self.inputs.judge
        rows = [row for batch in self.validation_batches for row in batch]
        validation = VALIDATION_COST * float(self.inputs.validation_rows.lengths[rows].sum())
        asking = 0.0 if judge is None else VALIDATION_COST * judge.tokens
        trained_at, done_at = [0.0], [0.0]
        for mini_batch in self.mini_batches(0):
            training = TRAIN_COST * float(lengths[list(mini_batch.rows)].sum())
            trained_at.append(done_at[-1] + training)
            measuring = validation * self.validates_at(mini_batch.iteration)
            measuring += asking * self.selects_at(mini_batch.iteration)
            done_at.append(trained_at[-1] + measuring)
        return trained_at, done_at
