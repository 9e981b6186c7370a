"""TrainingInputs, TrainingResult and Judge: the types that the training code passes around.

Does not: train.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_ft.data.tokens import TokenizedSplit
from mlx_ft.recipe.schema import TrainRecipe
from mlx_ft.system.console import Progress
from mlx_ft.train.adapters import AdapterShape
from mlx_ft.train.metrics import Metric
from mlx_ft.train.numerics.forward import Forward
from mlx_ft.train.numerics.prefix_cache import PrefixCache


@dataclass(frozen=True)
class Judgement:
    """Score of a checkpoint on a few prompts.

    suite: name of the suite that the prompts are from.
    score: the score that counts, from 0 to 1.
    n: number of prompts.
    low, high: ends of the score's 95 % interval.
    """

    suite: str
    score: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class Judge:
    """Scores the model in training on a few prompts.

    ask: (iteration, progress) -> the score of the weights as they are.
    tokens: cost of asking once (forward passes of a token).
    """

    ask: Callable[[int, Progress], Judgement]
    tokens: int


class SegmentOver(Exception):
    """Ends a process that has done its share of a run; its checkpoint is written."""


@dataclass(frozen=True)
class TrainingInputs:
    """Everything that the training of one seed needs.

    model: the model with its adapter.
    forward: the split forward pass of that model.
    shape: size of the adapter.
    adapter_config: content of adapter_config.json.
    train_rows, validation_rows: tokenized rows.
    recipe: the recipe's `train` section, with this seed.
    iterations: mini-batches in all.
    folder: stage folder for metrics, checkpoints and adapter.
    inputs_hash: hash that a checkpoint must carry to be continued.
    prefix_limit_bytes: memory for outputs of the frozen layers (bytes).
    prefix_folder: folder for outputs of the frozen layers (None: they stay in memory).
    computed_by: part of the key of those outputs: everything they depend on, except the rows.
    shuffle: draw rows at random; False trains them in file order in every epoch.
    judge: scores checkpoints for the selection (None: no scores). It needs `model_folder`.
    model_folder: folder to reload frozen layers from.
    prefixes: caches of training and validation rows that an earlier seed has filled.
    untrained: (validation loss, its number of tokens) before the first update, if an earlier seed
        has measured it.
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
    inputs_hash: str
    prefix_limit_bytes: int
    prefix_folder: Path | None
    computed_by: str
    shuffle: bool = True
    judge: Judge | None = None
    model_folder: Path | None = None
    prefixes: tuple[PrefixCache, PrefixCache] | None = None
    untrained: tuple[float, int] | None = None


@dataclass(frozen=True)
class TrainingResult:
    """Outcome of one training. Losses are per trained token (nats).

    iterations, updates: mini-batches and optimizer updates done.
    epochs: passes over the rows.
    first_validation_loss: before the first update.
    final_validation_loss, final_train_loss: the last ones measured.
    trained_tokens: tokens that the loss counted.
    seconds: time from the first mini-batch on (seconds).
    peak_memory_bytes: peak of MLX's memory (bytes).
    skipped_updates: updates whose loss or gradient was not finite.
    best_validation_loss, best_iteration: the lowest validation loss and its iteration.
    chosen_iteration, chosen_validation_loss: the weights that the training hands over.
    chosen_score: their score (None without a judge).
    ended_early: patience ended the training.
    """

    iterations: int
    updates: int
    epochs: float
    first_validation_loss: float
    final_validation_loss: float
    final_train_loss: float
    trained_tokens: int
    seconds: float
    peak_memory_bytes: int
    skipped_updates: int
    best_validation_loss: float
    best_iteration: int
    chosen_iteration: int
    chosen_score: float | None
    chosen_validation_loss: float
    ended_early: bool


def result_info(
    result: TrainingResult, inputs: TrainingInputs, compute: str, fallbacks: Sequence[str]
) -> Metric:
    """Return the `info` of the training stage's manifest, as plain JSON.

    compute: how the model was held and computed.
    fallbacks: parts of the fast way that were not taken, each with its cost.
    """
    shape = inputs.shape
    return {
        **asdict(result),
        "trainable_parameters": shape.trainable_parameters,
        "total_parameters": shape.total_parameters,
        "num_layers": shape.num_layers,
        "adapted_layers": list(shape.modules),
        "compute": compute,
        "fast_path": inputs.forward.note,
        "forward": {**asdict(inputs.forward.choice), "fallbacks": list(fallbacks)},
    }
