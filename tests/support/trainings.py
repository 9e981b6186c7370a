"""Tiny real models with adapters and tokenized rows, for the training room's tests."""

from collections.abc import Callable

import numpy as np

from mlx_ft.data.tokens import TokenizedSplit, pack_rows
from mlx_ft.train.contract import Listener, TrainingJob, TrainingResult
from mlx_ft.train.loop import train
from mlx_ft.train.metrics import Metric


def random_rows(count: int, seed: int, longest: int = 30) -> TokenizedSplit:
    """Return rows of random ids; the last half of each is trained, as an answer would be."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(generator.integers(4, longest))
        trained = np.zeros(length, np.uint8)
        trained[length // 2 :] = 1
        rows.append((generator.integers(3, 320, length).astype(np.int32), trained))
    return pack_rows(rows, list(range(1, count + 1)))


def listener(metrics: list[Metric] | None = None, stop_after: int | None = None) -> Listener:
    """Collect metrics; ask to stop once `stop_after` progress reports have come."""
    seen = {"steps": 0}

    def progress(done: float, total: float, text: str) -> None:
        seen["steps"] += text.startswith("iteration")

    def stop() -> bool:
        return stop_after is not None and seen["steps"] > stop_after

    return Listener((metrics if metrics is not None else []).append, progress, stop)


def trained_past_its_best(
    job_of_seed: Callable[[int], TrainingJob],
) -> tuple[TrainingJob, TrainingResult]:
    """Train jobs until one has its lowest validation loss well before its end, and return that.

    At a high rate a tiny model's loss goes up and down, and which seed ends above its best depends
    on the last bits of a machine's arithmetic.
    """
    for seed in range(8):
        job = job_of_seed(seed)
        result = train(job, listener())
        if result.best_iteration < 35:
            return job, result
    raise AssertionError("eight seeds were all at their best at the end")
