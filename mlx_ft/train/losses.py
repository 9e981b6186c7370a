"""The exact loss: a sum over trained tokens, divided once per optimizer step.

loss = sum of weighted cross-entropy / sum of weights, over the whole step (DESIGN of this package:
batch 4 = batch 1 x accumulation 4). mlx-lm averages averages and counts one padding token a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ft.tokens import TokenizedSplit
from mlx_ft.train.forward import Forward


@dataclass(frozen=True)
class Batch:
    """Padded rows: `ids` (B, T), and of the N trained predictions the flat `positions` within
    (B x T) that predict them, their `targets`; `tokens` counts real (unpadded) ones."""

    ids: mx.array
    positions: mx.array
    targets: mx.array
    tokens: int
    trained_tokens: int
    rows: tuple[int, ...]
    lengths: tuple[int, ...]


def make_batch(split: TokenizedSplit, rows: tuple[int, ...]) -> Batch:
    """Return the rows padded on the right to the longest of them.

    The last token of a row predicts nothing, so T is one less than the longest row. Padding is
    never a target and, with causal attention, never seen by a real token.
    """
    contents = [split.row(row) for row in rows]
    width = max(len(ids) for ids, _ in contents) - 1
    padded = np.zeros((len(rows), width), dtype=np.int32)
    positions, targets = [], []
    for index, (ids, trained) in enumerate(contents):
        padded[index, : len(ids) - 1] = ids[:-1]
        predicted = np.flatnonzero(trained[1:])
        positions.append(index * width + predicted)
        targets.append(ids[1:][predicted])
    flat_positions = np.concatenate(positions).astype(np.int32)
    lengths = tuple(len(ids) - 1 for ids, _ in contents)
    return Batch(
        mx.array(padded),
        mx.array(flat_positions),
        mx.array(np.concatenate(targets).astype(np.int32)),
        sum(lengths),
        len(flat_positions),
        rows,
        lengths,
    )


def cross_entropy_sum(
    forward: Forward, batch: Batch, prefix: mx.array, shared_tokens: int = 0
) -> mx.array:
    """Return the sum (not mean) of cross-entropy over the batch's trained tokens, in float32.

    The first `shared_tokens` are the same in every row, and nothing is predicted from them.
    """
    hidden = forward.top(batch.ids, prefix, shared_tokens if len(batch.rows) > 1 else 0)
    trained = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    logits = forward.head(trained).astype(mx.float32)
    loss: mx.array = nn.losses.cross_entropy(logits, batch.targets, reduction="sum")
    return loss
