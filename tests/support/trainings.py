"""Training inputs of tiny models, run in this process."""

import io
from collections.abc import Callable

import numpy as np
from mlx.utils import tree_flatten

from mlx_ft.data.tokens import TokenizedSplit, pack_rows
from mlx_ft.system.console import Console
from mlx_ft.train.contract import TrainingInputs, TrainingResult
from mlx_ft.train.loop import train
from mlx_ft.train.metrics import Metric


def random_rows(count: int, seed: int, longest: int = 30, start: int = 0) -> TokenizedSplit:
    """Return rows of random ids; the last half of each is trained, as an answer would be.

    start: tokens that all rows begin with.
    """
    generator = np.random.default_rng(seed)
    common = np.random.default_rng(seed + 1).integers(3, 320, start)
    untrained = np.zeros(start, np.uint8)
    rows = []
    for _ in range(count):
        length = int(generator.integers(4, longest))
        trained = np.zeros(length, np.uint8)
        trained[length // 2 :] = 1
        ids = generator.integers(3, 320, length)
        rows.append((np.r_[common, ids].astype(np.int32), np.r_[untrained, trained]))
    return pack_rows(rows, list(range(1, count + 1)))


class Steps:
    """Progress that counts the steps of a training and keeps its texts."""

    def __init__(self) -> None:
        self.count = 0
        self.texts: list[str] = []

    def update(self, done: float, text: str = "") -> None:
        assert 0 <= done <= 1, "its total is 1"
        self.count += text.startswith("iteration")
        self.texts.append(text)


def train_here(
    inputs: TrainingInputs,
    metrics: list[Metric] | None = None,
    stop_after: int | None = None,
    console: Console | None = None,
) -> TrainingResult:
    """Train in this process; collect metrics; ask for a stop after so many progress reports."""
    steps = Steps()

    def stop_requested() -> bool:
        return stop_after is not None and steps.count > stop_after

    on_metric = (metrics if metrics is not None else []).append
    return train(inputs, console or quiet(), steps, stop_requested, on_metric)


def quiet() -> Console:
    """Return a console of which the test reads nothing."""
    return Console(io.StringIO())


def trained_past_its_best(
    inputs_of_seed: Callable[[int], TrainingInputs],
) -> tuple[TrainingInputs, TrainingResult]:
    """Train until one training has its lowest validation loss well before its end, and return that.

    At a high rate a tiny model's loss goes up and down, and which seed ends above its best depends
    on the last bits of a machine's arithmetic.
    """
    for seed in range(8):
        inputs = inputs_of_seed(seed)
        result = train_here(inputs)
        if result.best_iteration < 35:
            return inputs, result
    raise AssertionError("eight seeds were all at their best at the end")


def adapter_of(inputs: TrainingInputs) -> dict[str, np.ndarray]:
    return {n: np.array(a) for n, a in tree_flatten(inputs.model.trainable_parameters())}


def assert_same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        difference = np.abs(one[name] - other[name]).max()
        assert one[name].tobytes() == other[name].tobytes(), f"{name} differs by {difference}"
