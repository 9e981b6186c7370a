"""Setup shared by all seeds of a recipe: model, rows and split forward pass, loaded once.

Does: put a fresh adapter on the model for each seed. Does not: train, or know the number of seeds.
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
from mlx_ft.train.contract import TrainingInputs
from mlx_ft.train.handoff import TrainRequest
from mlx_ft.train.metrics import Metric
from mlx_ft.train.numerics.forward import Forward, choose_forward, trained_outside_layers
from mlx_ft.train.numerics.prefix_cache import PrefixCache
from mlx_ft.train.trainer import prefix_caches

# Freed memory that MLX may keep with train.low_memory.
LOW_MEMORY_CACHE_BYTES = 32 << 20


class Setup:
    """A loaded model with its rows, for trainings that differ in seed and folder alone."""

    def __init__(self, request: TrainRequest) -> None:
        recipe = request.recipe
        self.train_rows = read_split(request.data_folder / "train.safetensors")
        self.validation_rows = read_split(request.data_folder / "valid.safetensors")
        self.loaded = load_model(
            request.model_folder,
            ChatFormat.of(recipe.chat),
            low_memory=recipe.train.low_memory,
        )
        if recipe.train.low_memory:  # after the model, for which a GPU's own limits are set
            mx.set_cache_limit(LOW_MEMORY_CACHE_BYTES)
        self._modules = dict(self.loaded.model.named_modules())
        self._parameters: int | None = None
        self._forward: Forward | None = None
        self._prefixes: tuple[PrefixCache, PrefixCache] | None = None
        self._untrained: tuple[float, int] | None = None

    def clear(self, request: TrainRequest) -> bool:
        """Take the last training's adapter off; return whether another training may begin here.

        It may not after full fine-tuning, nor where an embedding or head was adapted: the split
        holds on to those.
        """
        if request.recipe.train.fine_tune_type == "full":
            return False
        if trained_outside_layers(self.loaded.model):
            return False
        return take_adapter_off(self.loaded.model, self._modules)

    def inputs(self, request: TrainRequest) -> TrainingInputs:
        """Put a fresh adapter on the bare model and return the inputs of its training."""
        train, model = request.recipe.train, self.loaded.model
        layers = resolve_num_layers(train.num_layers, len(model.layers))
        config = adapter_config(request.recipe, layers)
        shape = put_adapter(model, train, config)
        if self._parameters is None:
            self._parameters = shape.total_parameters
        if train.resume_adapter_file is not None:
            load_adapter_weights(model, Path(train.resume_adapter_file))
        model.eval()
        forward = self._forward = self._forward or self._split(request, layers)
        inputs = TrainingInputs(
            model=model,
            forward=forward,
            # Released frozen layers have no parameters to count.
            shape=replace(shape, total_parameters=self._parameters),
            adapter_config=config,
            train_rows=self.train_rows,
            validation_rows=self.validation_rows,
            recipe=train,
            iterations=total_iterations(
                len(self.train_rows), train.batch_size, train.epochs, train.iters
            ),
            folder=request.folder,
            inputs_hash=request.inputs,
            prefix_limit_bytes=0 if train.prefix_cache == "off" else request.prefix_limit_bytes,
            prefix_folder=request.prefix_folder if train.prefix_cache == "disk" else None,
            computed_by=self._computed_by(request, forward.frozen_layers),
            shuffle=not request.recipe.data.in_order,
            model_folder=request.model_folder,
            untrained=self._untrained,
        )
        self._prefixes = self._prefixes or prefix_caches(inputs)
        return replace(inputs, prefixes=self._prefixes)

    def remember(self, metric: Metric) -> None:
        """Keep the first validation for later seeds: a fresh adapter changes no output."""
        if metric["kind"] == "validation" and metric["iteration"] == 0:
            self._untrained = metric["loss"], metric["trained_tokens"]

    def _split(self, request: TrainRequest, layers: int) -> Forward:
        train = request.recipe.train
        longest = map(_longest_row, (self.train_rows, self.validation_rows))
        return choose_forward(
            self.loaded.model,
            layers,
            [max(longest, key=len).tolist()],
            train.grad_checkpoint,
            request.model_folder if train.low_memory else None,
            train.computes_inputs_again,
        )

    def _computed_by(self, request: TrainRequest, frozen_layers: int) -> str:
        """Return a hash of everything the frozen layers' outputs depend on, except the rows."""
        return hash_of(
            [
                request.model_identity,
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
