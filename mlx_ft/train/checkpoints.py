"""Checkpoints that are whole or do not exist, and hold all that a run needs to go on exactly.

A checkpoint is taken after an optimizer update. It holds the adapter, the optimizer's state and the
counters; data order and dropout are functions of (seed, iteration), so nothing else is needed.
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
    """How far a run is: mini-batches and updates done, and what was counted since the last report.

    `loss_sum`, `loss_weight`, `tokens` and `padded_tokens` belong to the running report;
    `trained_tokens` to the whole run, `seconds` is its time so far from its first mini-batch on,
    with validations and checkpoints, `peak_memory_bytes` the most that any of its processes held.
    `best_loss` is the lowest validation loss, `worse` how many validations have come after it,
    `last_loss` the latest one. The chosen iteration is the best one by `train.select`, with its
    score and validation loss; `not_better` comparisons have come after it.
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
    """Write `folder/<iteration>` whole, then delete older ones: kept are the newest `keep`, the
    chosen one, the one with the best validation loss, and every one that has a file
    `<name>.pinned` beside it.
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
    """Load a checkpoint into the model and the optimizer, and return where the run was."""
    load_adapter_weights(model, path / ADAPTER_FILE)
    state = mx.load(str(path / OPTIMIZER_FILE))
    assert isinstance(state, dict)
    optimizer.state = tree_unflatten(list(state.items()))
    return Position(**read_json(path / STATE_FILE))
