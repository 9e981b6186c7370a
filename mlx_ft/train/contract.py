"""What a training run is given, whom it tells, and what it came to. Does not: train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_ft.data.tokens import TokenizedSplit
from mlx_ft.engine.load import LoadedModel
from mlx_ft.recipe.schema import Recipe, TrainRecipe
from mlx_ft.train.adapters import AdapterShape
from mlx_ft.train.metrics import Metric
from mlx_ft.train.numerics.forward import Forward
from mlx_ft.train.numerics.prefix_cache import PrefixCache


@dataclass(frozen=True)
class Judgement:
    """How the weights of a moment did on a few prompts: the `score` that counts, from 0 to 1, over
    `n` prompts of a `suite`, and its 95 % interval.
    """

    suite: str
    score: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class Judge:
    """Asks the model a few prompts: `ask(iteration, sign of life)`, which costs about `tokens`
    forward passes of a token.
    """

    ask: Callable[[int, Callable[[], None]], Judgement]
    tokens: int


# (recipe, model with its adapter, stage folder) -> who judges it, if somebody is to.
MakeJudge = Callable[[Recipe, LoadedModel, Path], Judge | None]


class SegmentOver(Exception):
    """A process has done its share of a run, and its checkpoint is written."""


@dataclass(frozen=True)
class TrainingJob:
    """All that one run trains: the model with its adapter, the rows, and where results go.

    `folder` is the stage folder; `inputs` the hash that a checkpoint must carry to be continued.
    Outputs of the frozen layers are kept below `prefix_folder`, under a key that `computed_by`
    goes into, or in memory up to `prefix_limit_bytes`. Without `shuffle` rows are trained as they
    stand in every epoch. A `judge`, whose scores choose the weights, needs the `model_folder`.

    What another training of the same rows found out need not be done again: the caches `prefixes`
    of training and validation rows, and `untrained`, the validation loss before the first update
    with its number of tokens.
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
    prefix_folder: Path | None
    computed_by: str
    shuffle: bool = True
    judge: Judge | None = None
    model_folder: Path | None = None
    prefixes: tuple[PrefixCache, PrefixCache] | None = None
    untrained: tuple[float, int] | None = None


@dataclass(frozen=True)
class Listener:
    """Who wants to know: `metric` gets every report and validation, `progress` (done, of, text) in
    cost units, `stop_requested` is asked at every step boundary, and `say` gets what is neither."""

    metric: Callable[[Metric], None]
    progress: Callable[[float, float, str], None]
    stop_requested: Callable[[], bool]
    say: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to; losses are per trained token, in nats.

    The chosen weights are those that the run leaves; `chosen_score` is None without a judge.
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
