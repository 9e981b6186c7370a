"""Write and restore checkpoints that are complete or absent, for an exact resume.

A checkpoint is taken after an optimizer update. It holds the adapter, the optimizer's state and the
counters. Data order and dropout are functions of (seed, iteration), so nothing else is needed.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_unflatten

from mlx_ft.runs.folder import seal
from mlx_ft.system.files import flush_to_disk, read_json, write_json
from mlx_ft.train.adapters import (
    ADAPTER_FILE,
    load_adapter_weights,
    require_finite,
    save_adapter,
)
from mlx_ft.train.checkpoint_list import complete_checkpoints

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
# An empty file of a checkpoint's name with this ending keeps it for good.
PINNED = ".pinned"


@dataclass(frozen=True)
class Position:
    """Progress of a training: its counters at an optimizer update.

    iteration, update: mini-batches and optimizer updates done.
    loss_sum, loss_weight, tokens, padded_tokens: counted since the last report.
    trained_tokens: in the whole training.
    seconds: time since the first mini-batch, with validations and checkpoints (seconds).
    epoch: pass over the rows, from 0.
    gradient_norm: of the last update.
    skipped_updates, skipped_in_a_row: updates whose loss or gradient was not finite.
    best_loss, best_iteration: the lowest validation loss and its iteration.
    worse: validations since then.
    last_loss: the latest validation loss.
    chosen_iteration, chosen_score, chosen_loss: the best weights by `train.select`, with their
        score and validation loss.
    not_better: comparisons since then.
    peak_memory_bytes: the most that any process of the training held (bytes).
    """

    iteration: int = 0
    update: int = 0
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    tokens: int = 0
    padded_tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    epoch: int = 0
    gradient_norm: float = 0.0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0
    best_loss: float | None = None
    best_iteration: int = 0
    worse: int = 0
    last_loss: float | None = None
    chosen_iteration: int = 0
    chosen_score: float | None = None
    chosen_loss: float | None = None
    not_better: int = 0
    peak_memory_bytes: int = 0


def save_checkpoint(
    folder: Path,
    position: Position,
    model: nn.Module,
    optimizer: optimizers.Optimizer,
    adapter_config: dict[str, Any],
    inputs: str,
    keep: int,
) -> Path:
    """Write `folder/<iteration>`, complete or not at all, then delete older checkpoints.

    Kept are the newest `keep`, the chosen one, the one with the best validation loss, and every one
    with a file `<name>.pinned` beside it.
    """
    final = folder / f"{position.iteration:07d}"
    partial = folder / f"{final.name}.tmp"
    for left in folder.glob("*.tmp"):  # of a process that died, or a disk that was full
        shutil.rmtree(left)
    partial.mkdir(parents=True)
    save_adapter(model, adapter_config, partial)
    state = dict(tree_flatten(optimizer.state))
    require_finite(state, "optimizer state")
    mx.save_safetensors(str(partial / OPTIMIZER_FILE), state)
    write_json(partial / STATE_FILE, asdict(position))
    seal(partial, "checkpoint", inputs, {"iteration": position.iteration})
    if final.exists():
        shutil.rmtree(final)
    partial.replace(final)
    flush_to_disk(folder)
    for old in complete_checkpoints(folder, inputs)[:-keep]:
        best = int(old.name) in (position.best_iteration, position.chosen_iteration)
        if not best and not (folder / f"{old.name}{PINNED}").exists():
            shutil.rmtree(old)
    return final


def restore_checkpoint(path: Path, model: nn.Module, optimizer: optimizers.Optimizer) -> Position:
    """Load a checkpoint into the model and the optimizer; return its position."""
    load_adapter_weights(model, path / ADAPTER_FILE)
    state = mx.load(str(path / OPTIMIZER_FILE))
    assert isinstance(state, dict)
    optimizer.state = tree_unflatten(list(state.items()))
    return Position(**read_json(path / STATE_FILE))
