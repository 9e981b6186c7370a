"""Validate; keep the best weights by validation loss or score; end when patience is over.

Measuring changes no trained weight. Does not: decide when to measure (`plan.py`), or score answers
(`judge.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx

from mlx_ft.engine.load import load_layers, scalar
from mlx_ft.errors import Fault, GateFailed
from mlx_ft.train.adapters import ADAPTER_FILE, load_adapter_weights
from mlx_ft.train.checkpoint_list import CHECKPOINTS
from mlx_ft.train.checkpoints import Position
from mlx_ft.train.contract import TrainingInputs
from mlx_ft.train.numerics.losses import cross_entropy_sum
from mlx_ft.train.trainer import SMALLER_STEPS, Trainer


def validation_loss(trainer: Trainer) -> tuple[float, int]:
    """Return the present weights' loss per trained token on the fixed validation set, and the
    number of these tokens.
    """
    inputs, prefix = trainer.inputs, trainer.validation_prefix
    inputs.model.eval()
    total, weight, tokens = 0.0, 0.0, 0
    for mini_batch in trainer.plan.validation_batches:
        for batch in trainer.micro_batches(inputs.validation_rows, prefix, mini_batch):
            before = prefix.batch(batch)
            total += scalar(cross_entropy_sum(inputs.forward, batch, before, with_gradient=False))
            weight += batch.weight
            tokens += batch.trained_tokens
            trainer.show_progress("validation after iteration")
    return total / (weight or 1.0), tokens


def validate(trainer: Trainer) -> bool:
    """Measure the validation loss, and return whether it is the lowest so far.

    Raises GateFailed when it is not finite: answers of such weights are worthless.
    """
    position = trainer.position
    known = trainer.inputs.untrained if position.iteration == 0 else None
    loss, tokens = known or validation_loss(trainer)
    if not math.isfinite(loss):
        raise _not_a_number(position.iteration, loss)
    is_best = position.iteration > 0 and (position.best_loss is None or loss < position.best_loss)
    if is_best:
        position = replace(position, best_loss=loss, best_iteration=position.iteration, worse=0)
    elif position.iteration > 0:
        position = replace(position, worse=position.worse + 1)
    trainer.position = replace(position, last_loss=loss)
    trainer.log(
        {
            "kind": "validation",
            "iteration": position.iteration,
            "iterations": trainer.inputs.iterations,
            "update": position.update,
            "loss": loss,
            "trained_tokens": tokens,
            "best_iteration": position.best_iteration,
            "validations_since_best": position.worse,
        }
    )
    return is_best


def _not_a_number(iteration: int, loss: float) -> GateFailed:
    """Return the error for weights without a finite validation loss."""
    if iteration == 0:
        fix = (
            "the model gives it before any training: check that model and rows belong together, "
            "or use its bfloat16 or float32 version if it is in float16"
        )
    else:
        fix = SMALLER_STEPS
    return GateFailed(
        Fault(f"training, iteration {iteration}", f"the validation loss is {loss}", fix)
    )


def select(trainer: Trainer) -> bool:
    """Compare the weights, just validated, with the best so far; return whether they are better.

    By the judge's score, ties by validation loss; without a judge by validation loss alone.
    """
    inputs, position = trainer.inputs, trainer.position
    metric = {
        "kind": "selection",
        "iteration": position.iteration,
        "iterations": inputs.iterations,
        "update": position.update,
        "by": inputs.recipe.select.by,
        "validation_loss": position.last_loss,
    }
    score = None
    if inputs.judge is not None:
        with whole_model(inputs):
            inputs.model.eval()
            progress = trainer.progress_of("questions after iteration")
            verdict = inputs.judge.ask(position.iteration, progress)
        score = verdict.score
        metric |= vars(verdict)
    now, best = (score, position.last_loss), (position.chosen_score, position.chosen_loss)
    better = position.chosen_iteration == 0 or _rank(*now) > _rank(*best)
    if better:
        position = replace(
            position,
            chosen_iteration=position.iteration,
            chosen_score=score,
            chosen_loss=position.last_loss,
            not_better=0,
        )
    else:
        position = replace(position, not_better=position.not_better + 1)
    trainer.position = position
    trainer.log(
        {
            **metric,
            "best_iteration": position.chosen_iteration,
            "selections_since_best": position.not_better,
        }
    )
    return better


def _rank(score: float | None, loss: float | None) -> tuple[float, float]:
    """Return the sort key of weights, the best last."""
    assert loss is not None, "weights that are compared have been validated"
    return (score or 0.0, -loss)


def patience_is_over(inputs: TrainingInputs, position: Position) -> bool:
    """Return whether the training ends here, after too many comparisons without a better one."""
    patience = inputs.recipe.select.patience
    return patience is not None and position.not_better >= patience


@contextmanager
def whole_model(inputs: TrainingInputs) -> Iterator[None]:
    """Restore the frozen layers' weights for a while, if they were released."""
    forward = inputs.forward
    released = forward.frozen_released
    if released:
        assert inputs.model_folder is not None, "a model that is asked is read from its folder"
        forward.restore_frozen(
            load_layers(inputs.model_folder, forward.frozen_layers, inputs.recipe.low_memory)
        )
    try:
        yield
    finally:
        if released:
            forward.release_frozen()
        else:
            forward.evaluate()  # lets go of streamed layers
        mx.clear_cache()


def load_selected(trainer: Trainer) -> None:
    """Load the selected weights into the model, unless they are the last ones."""
    position = trainer.position
    if trainer.inputs.recipe.select.by is None or position.chosen_iteration == position.iteration:
        return
    folder = trainer.inputs.folder / CHECKPOINTS / f"{position.chosen_iteration:07d}"
    load_adapter_weights(trainer.inputs.model, folder / ADAPTER_FILE)
