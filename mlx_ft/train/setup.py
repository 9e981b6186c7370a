"""What the trainings of one recipe stand on, whatever their seed.

Does: read the rows, load and split the model and prove the split, once; put each training's own
adapter on it. Does not: train, or know how many trainings there are.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_ft import BLAS
from mlx_ft.data.tokens import Ids, TokenizedSplit, read_split
from mlx_ft.engine.cpu_kernels import CPU_MATH_VERSION, exp_is_slow
from mlx_ft.engine.load import load_model
from mlx_ft.model.chat import ChatFormat
from mlx_ft.system.files import hash_of
from mlx_ft.train.adapters import (
    adapter_config,
    load_adapter_weights,
    put_adapter,
    resolve_num_layers,
    take_adapter_off,
)
from mlx_ft.train.batches import total_iterations
from mlx_ft.train.contract import TrainingJob
from mlx_ft.train.handoff import TrainStage
from mlx_ft.train.metrics import Metric
from mlx_ft.train.numerics.forward import Forward, choose_forward, trained_outside_layers
from mlx_ft.train.numerics.prefix_cache import PrefixCache
from mlx_ft.train.trainer import prefix_caches

# Freed arrays that MLX may hold on to with train.low_memory.
LOW_MEMORY_CACHE_BYTES = 32 << 20


class Ground:
    """A loaded model with its rows, for trainings that differ in seed and folder alone."""

    def __init__(self, stage: TrainStage) -> None:
        recipe = stage.recipe
        if recipe.train.low_memory:
            mx.set_cache_limit(LOW_MEMORY_CACHE_BYTES)
        self.train_rows = read_split(stage.data_folder / "train.safetensors")
        self.validation_rows = read_split(stage.data_folder / "valid.safetensors")
        self.loaded = load_model(
            stage.model_folder,
            ChatFormat.of(recipe.chat),
            low_memory=recipe.train.low_memory,
        )
        self._modules = dict(self.loaded.model.named_modules())
        self._parameters: int | None = None
        self._forward: Forward | None = None
        self._prefixes: tuple[PrefixCache, PrefixCache] | None = None
        self._untrained: tuple[float, int] | None = None

    def clear(self, stage: TrainStage) -> bool:
        """Take the last training's adapter off; return whether another training may begin here.

        It may not where the model's own weights were trained, nor where an embedding or head was
        adapted: the split holds on to those.
        """
        if stage.recipe.train.fine_tune_type == "full" or trained_outside_layers(self.loaded.model):
            return False
        return take_adapter_off(self.loaded.model, self._modules)

    def job(self, stage: TrainStage) -> TrainingJob:
        """Put a fresh adapter on the bare model and return what is to be trained."""
        train, model = stage.recipe.train, self.loaded.model
        layers = resolve_num_layers(train.num_layers, len(model.layers))
        config = adapter_config(stage.recipe, layers)
        shape = put_adapter(model, train, config)
        if self._parameters is None:
            self._parameters = shape.total_parameters
        if train.resume_adapter_file is not None:
            load_adapter_weights(model, Path(train.resume_adapter_file))
        model.eval()
        forward = self._forward = self._forward or self._split(stage, layers)
        job = TrainingJob(
            model=model,
            forward=forward,
            # Frozen layers that were let go have no parameters to count.
            shape=replace(shape, total_parameters=self._parameters),
            adapter_config=config,
            train_rows=self.train_rows,
            validation_rows=self.validation_rows,
            recipe=train,
            iterations=total_iterations(
                len(self.train_rows), train.batch_size, train.epochs, train.iters
            ),
            folder=stage.folder,
            inputs=stage.inputs,
            prefix_limit_bytes=0 if train.prefix_cache == "off" else stage.prefix_limit_bytes,
            prefix_folder=stage.prefix_folder if train.prefix_cache == "disk" else None,
            computed_by=self._computed_by(stage, forward.frozen_layers),
            shuffle=not stage.recipe.data.in_order,
            model_folder=stage.model_folder,
            untrained=self._untrained,
        )
        self._prefixes = self._prefixes or prefix_caches(job)
        return replace(job, prefixes=self._prefixes)

    def remember(self, metric: Metric) -> None:
        """Take note of the first validation: a fresh adapter adds nothing, whatever its seed."""
        if metric["kind"] == "validation" and metric["iteration"] == 0:
            self._untrained = metric["loss"], metric["trained_tokens"]

    def _split(self, stage: TrainStage, layers: int) -> Forward:
        train = stage.recipe.train
        longest = map(_longest_row, (self.train_rows, self.validation_rows))
        return choose_forward(
            self.loaded.model,
            layers,
            [max(longest, key=len).tolist()],
            train.grad_checkpoint,
            stage.model_folder if train.low_memory else None,
            train.computes_inputs_again,
        )

    def _computed_by(self, stage: TrainStage, frozen_layers: int) -> str:
        """Return a hash of all that the outputs of frozen layers depend on, but the rows."""
        return hash_of(
            [
                stage.model_identity,
                frozen_layers,
                self.loaded.compute,
                {package: version(package) for package in ("mlx", "mlx-lm")},
                # The order of sums, and so the last bits, depends on how many threads share them.
                [BLAS.name, BLAS.detail, os.cpu_count(), os.environ.get("OPENBLAS_NUM_THREADS")],
                CPU_MATH_VERSION if exp_is_slow() else None,
            ]
        )


def _longest_row(split: TokenizedSplit) -> Ids:
    return split.row(int(np.argmax(split.lengths)))[0]
