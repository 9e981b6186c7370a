"""What it costs where a training does not take the whole fast way.

Costs are counted from layers, rows and epochs, not measured.
"""

from __future__ import annotations

from collections.abc import Iterator

from mlx_ft.train.accumulation import padded_groups
from mlx_ft.train.batches import batches_per_epoch
from mlx_ft.train.contract import TrainingInputs


def fallbacks(inputs: TrainingInputs) -> tuple[str, ...]:
    """Return a sentence for each part of the fast way that is not taken, with its cost."""
    return tuple(_fallbacks(inputs))


def _fallbacks(inputs: TrainingInputs) -> Iterator[str]:
    choice, rows, trained_layers = inputs.forward.choice, inputs.train_rows, inputs.shape.num_layers
    padded = f"rows are padded, {padding_share(inputs):.0%} more tokens"
    trained = float(rows.trained.sum()) / float(rows.lengths.sum())
    if choice.name == "plain":
        costs = [f"logits are computed at every token ({trained:.0%} are trained)", padded]
        frozen_layers = choice.layers - trained_layers
        epochs = inputs.iterations / batches_per_epoch(len(rows), inputs.recipe.batch_size)
        if frozen_layers > 0 and epochs > 1:
            more = more_work(frozen_layers, trained_layers, epochs)
            again = f"{frozen_layers} frozen layers run in every epoch, {more:.0%} more work"
            costs.insert(0, again)
        yield f"{choice.reason}: slower and larger; {'; '.join(costs)}"
        return
    if not choice.packs:
        yield f"rows do not go through behind each other: {padded}"
    if not choice.skips and trained < 1:
        more = (1 - trained) / trained_layers
        yield f"the last layer is computed at every token: up to {more:.0%} more work"


def more_work(frozen_layers: int, trained_layers: int, epochs: float) -> float:
    """Return how much more there is to compute when frozen layers run in every epoch, not in one.

    A frozen layer goes forward, a trained one forward and backward.
    """
    return frozen_layers * (epochs - 1) / (frozen_layers + 2 * trained_layers * epochs)


def padding_share(inputs: TrainingInputs) -> float:
    """Return the padding of batches in file order, as a share of their real tokens."""
    lengths, recipe = inputs.train_rows.lengths - 1, inputs.recipe
    padded = 0
    for first in range(0, len(lengths), recipe.batch_size):
        batch = range(first, min(first + recipe.batch_size, len(lengths)))
        for group in padded_groups(lengths, batch, recipe.micro_batch_tokens):
            padded += len(group) * max(int(lengths[row]) for row in group)
    return padded / float(lengths.sum()) - 1
