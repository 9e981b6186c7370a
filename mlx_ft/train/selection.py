"""Which weights of a run are the best: the validation loss, and the score of a few prompts.

Does: measure the weights as they are, remember the best, and say when patience is over. Both
measures change nothing that is trained. Does not: decide when (`plan.py`), or know how answers
are scored (that is the job's judge).
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
from mlx_ft.train.contract import TrainingJob
from mlx_ft.train.numerics.losses import cross_entropy_sum
from mlx_ft.train.trainer import SMALLER_STEPS, Run


def validation_loss(run: Run) -> tuple[float, int]:
    """Return the loss of the weights as they are on the fixed validation set, per trained token,
    and the number of these.
    """
    run.job.model.eval()
    total, weight, tokens = 0.0, 0.0, 0
    prefix = run.validation_prefix
    for mini_batch in run.course.validation_batches:
        for batch in run.micro_batches(run.job.validation_rows, prefix, mini_batch):
            before = prefix.batch(batch)
            total += scalar(cross_entropy_sum(run.job.forward, batch, before, with_gradient=False))
            weight += batch.weight
            tokens += batch.trained_tokens
            run.show_progress("validation after iteration")
    return total / (weight or 1.0), tokens


def validate(run: Run) -> bool:
    """Measure the validation loss, and return whether it is the lowest so far.

    Raises GateFailed when it is not finite: no answer of such weights is worth anything.
    """
    place = run.position
    known = run.job.untrained if place.iteration == 0 else None
    loss, tokens = known or validation_loss(run)
    if not math.isfinite(loss):
        raise _not_a_number(place.iteration, loss)
    is_best = place.iteration > 0 and (place.best_loss is None or loss < place.best_loss)
    if is_best:
        place = replace(place, best_loss=loss, best_iteration=place.iteration, worse=0)
    elif place.iteration > 0:
        place = replace(place, worse=place.worse + 1)
    run.position = replace(place, last_loss=loss)
    run.tell(
        {
            "kind": "validation",
            "iteration": place.iteration,
            "iterations": run.job.iterations,
            "update": place.update,
            "loss": loss,
            "trained_tokens": tokens,
            "best_iteration": place.best_iteration,
            "validations_since_best": place.worse,
        }
    )
    return is_best


def _not_a_number(iteration: int, loss: float) -> GateFailed:
    """Return what stops a run whose weights give no finite validation loss."""
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


def select(run: Run) -> bool:
    """Compare the weights, just validated, with the best so far; return whether they are better.

    By the judge's score, ties by validation loss; without a judge by validation loss alone.
    """
    judge, place = run.job.judge, run.position
    metric = {
        "kind": "selection",
        "iteration": place.iteration,
        "iterations": run.job.iterations,
        "update": place.update,
        "by": run.job.recipe.select.by,
        "validation_loss": place.last_loss,
    }
    score = None
    if judge is not None:
        with whole_model(run.job):
            run.job.model.eval()
            verdict = judge.ask(
                place.iteration, lambda: run.show_progress("questions after iteration")
            )
        score = verdict.score
        metric |= vars(verdict)
    now, best = (score, place.last_loss), (place.chosen_score, place.chosen_loss)
    better = place.chosen_iteration == 0 or _rank(*now) > _rank(*best)
    if better:
        place = replace(
            place,
            chosen_iteration=place.iteration,
            chosen_score=score,
            chosen_loss=place.last_loss,
            not_better=0,
        )
    else:
        place = replace(place, not_better=place.not_better + 1)
    run.position = place
    run.tell(
        {
            **metric,
            "best_iteration": place.chosen_iteration,
            "selections_since_best": place.not_better,
        }
    )
    return better


def _rank(score: float | None, loss: float | None) -> tuple[float, float]:
    """Return what orders weights, the best last."""
    assert loss is not None, "weights that are compared have been validated"
    return (score or 0.0, -loss)


def patience_is_over(job: TrainingJob, place: Position) -> bool:
    """Say whether the run ends here because nothing has got better for long enough."""
    patience = job.recipe.select.patience
    return patience is not None and place.not_better >= patience


@contextmanager
def whole_model(job: TrainingJob) -> Iterator[None]:
    """Have the frozen layers' weights back for a while, if they were let go."""
    forward = job.forward
    released = forward.frozen_released
    if released:
        assert job.model_folder is not None, "a model that is asked is read from its folder"
        forward.restore_frozen(
            load_layers(job.model_folder, forward.frozen_layers, job.recipe.low_memory)
        )
    try:
        yield
    finally:
        if released:
            forward.release_frozen()
        else:
            forward.evaluate()  # lets go of streamed layers
        mx.clear_cache()


def take_chosen(run: Run) -> None:
    """Put the chosen weights into the model, where they are not the last ones anyway."""
    place = run.position
    if run.job.recipe.select.by is None or place.chosen_iteration == place.iteration:
        return
    folder = run.job.folder / CHECKPOINTS / f"{place.chosen_iteration:07d}"
    load_adapter_weights(run.job.model, folder / ADAPTER_FILE)
