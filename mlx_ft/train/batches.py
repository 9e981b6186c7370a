"""Which rows are in which batch. Pure: numpy and integers, no model.

Every epoch visits every row once, in batches drawn at random, or in the rows' own order where a
recipe wants that. Rows of similar length are not put into one batch: then each batch is of one
kind, and held-out loss came out 1 % higher (LOG.md). Nothing is padded all the same, because the
rows of a batch are packed (`train/numerics/packing.py`).

The plan depends on (rows, batch_size, seed, epoch) alone, so a resumed run finds its place by
counting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MiniBatch:
    """One mini-batch.

    iteration: its number in the run, from 1.
    epoch: pass over the rows, from 0.
    rows: indices of its rows.
    """

    iteration: int
    epoch: int
    rows: tuple[int, ...]


def plan_epoch(
    rows: int, batch_size: int, seed: int, epoch: int, shuffle: bool = True
) -> list[Indices]:
    """Return the epoch's batches of row indices; the last one may be smaller.

    Without `shuffle` they are the rows as they stand.
    """
    order = np.random.default_rng([seed, epoch]).permutation(rows) if shuffle else np.arange(rows)
    return np.split(order, range(batch_size, rows, batch_size))


def batches_per_epoch(rows: int, batch_size: int) -> int:
    """Return how many mini-batches visit every row once."""
    return -(-rows // batch_size)


def total_iterations(rows: int, batch_size: int, epochs: int | None, iters: int | None) -> int:
    """Return a run's number of mini-batches: `iters`, or `epochs` (2 when neither is given)."""
    if iters is not None:
        return iters
    return batches_per_epoch(rows, batch_size) * (2 if epochs is None else epochs)


def total_updates(iterations: int, grad_accumulation_steps: int) -> int:
    """Return the number of optimizer updates; the last, smaller window makes one too."""
    return -(-iterations // grad_accumulation_steps)


def plan_run(
    rows: int,
    batch_size: int,
    seed: int,
    iterations: int,
    start: int = 0,
    shuffle: bool = True,
) -> Iterator[MiniBatch]:
    """Yield the mini-batches after iteration `start` up to `iterations`, epoch after epoch."""
    per_epoch = batches_per_epoch(rows, batch_size)
    for epoch in range(start // per_epoch, -(-iterations // per_epoch)):
        for offset, batch in enumerate(plan_epoch(rows, batch_size, seed, epoch, shuffle)):
            iteration = epoch * per_epoch + offset + 1
            if start < iteration <= iterations:
                yield MiniBatch(iteration, epoch, tuple(int(row) for row in batch))


def plan_validation(
    lengths: Sequence[int] | npt.NDArray[np.int64], batch_size: int, val_batches: int
) -> list[tuple[int, ...]]:
    """Return the fixed validation batches: the first rows of the file, by length; -1 means all."""
    count = len(lengths) if val_batches < 0 else min(len(lengths), val_batches * batch_size)
    order = sorted(range(count), key=lambda row: (int(lengths[row]), row))
    return [tuple(order[start : start + batch_size]) for start in range(0, count, batch_size)]
