"""Forecast adapter parameters, optimizer updates and disk use of a run.

Does not: judge (`checks.py`), load anything, or forecast memory (`memory.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_ft.model.shapes import ModelShape, Module
from mlx_ft.recipe.fields import optimizer_updates
from mlx_ft.recipe.schema import ExportRecipe, TrainRecipe

FLOAT32_BYTES = 4
HALF_BYTES = 2
# Arrays of the adapter's size that each optimizer keeps, in float32 (mlx.optimizers).
OPTIMIZER_STATES = {"adam": 2, "adamw": 2, "muon": 1, "sgd": 1, "adafactor": 1, "lion": 1}


@dataclass(frozen=True)
class DiskForecast:
    """Bytes that each stage leaves on the disk.

    fused: is there until the run has ended.
    """

    train_bytes: int
    fused_bytes: int
    quantized_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.train_bytes + self.fused_bytes + self.quantized_bytes


def adapted_layers(shape: ModelShape, train: TrainRecipe) -> tuple[tuple[Module, ...], ...]:
    """Return the top `num_layers` layers; all of them when it is -1, or more than there are."""
    return shape.layers if train.num_layers < 0 else shape.layers[-train.num_layers :]


def adapted_modules(shape: ModelShape, train: TrainRecipe) -> dict[str, Module]:
    """Return the modules that get an adapter, chosen as mlx-lm chooses them, by their whole names.

    Without keys: every linear layer of the top `num_layers` layers. With keys: those of these
    names, and modules outside the layers (`lm_head`) that are named.
    """
    layers, keys = adapted_layers(shape, train), train.lora_parameters.keys
    found = {
        f"model.layers.{index}.{module.name}": module
        for index, layer in enumerate(layers, start=len(shape.layers) - len(layers))
        for module in layer
        if keys is None or module.name in keys
    }
    return found | {root.name: root for root in shape.roots if root.name in (keys or ())}


def trainable_parameters(shape: ModelShape, train: TrainRecipe) -> int:
    """Return the adapter's parameters at the recipe's rank, or all of the layers' for full."""
    modules = adapted_modules(shape, train).values()
    if train.fine_tune_type == "full":
        return sum(module.parameters for module in modules)
    magnitudes = train.fine_tune_type == "dora"
    extra = sum(module.outputs for module in modules) if magnitudes else 0
    return extra + train.lora_parameters.rank * sum(module.adapter_parameters for module in modules)


def run_updates(train: TrainRecipe, rows: int) -> int:
    """Return how often the optimizer steps; partial batches and accumulations count as whole ones.

    Uses `iters`, or `epochs` over `rows` training rows.
    """
    if train.iters is not None:
        iterations = train.iters
    else:
        assert train.epochs is not None, "a recipe has iters or epochs"
        iterations = train.epochs * math.ceil(rows / train.batch_size)
    return optimizer_updates(iterations, train.grad_accumulation_steps)


def parameters_from_file(config: Mapping[str, Any], model_bytes: int) -> int:
    """Return a model's parameters as its file size and quantization suggest; not exact."""
    quantization = config.get("quantization")
    if isinstance(quantization, Mapping):
        bits, group = quantization.get("bits", 4), quantization.get("group_size", 64)
        return round(model_bytes / quantized_bytes_each(bits, group))
    dtype = config.get("torch_dtype") or config.get("dtype")
    return model_bytes // (FLOAT32_BYTES if dtype == "float32" else HALF_BYTES)


def quantized_bytes_each(bits: int, group_size: int) -> float:
    """Return bytes a weight of MLX's affine quantization, its 16-bit scales and biases included."""
    return bits / 8 + 2 * HALF_BYTES / group_size


def disk_forecast(
    parameters: int,
    trainable: int,
    train: TrainRecipe,
    export: ExportRecipe,
    fused: bool,
    half_parameters: int = 0,
) -> DiskForecast:
    """Return the disk that the stages need, with one more checkpoint while one is replaced.

    fused: a 16-bit copy of the model is needed.
    half_parameters: parameters that stay 16-bit in the quantized model.
    """
    adapter_bytes = trainable * FLOAT32_BYTES
    checkpoint_bytes = adapter_bytes * (1 + OPTIMIZER_STATES[train.optimizer])
    each = quantized_bytes_each(export.most_bits, export.q_group_size)
    return DiskForecast(
        train_bytes=adapter_bytes + (train.keep_checkpoints + 1) * checkpoint_bytes,
        fused_bytes=parameters * HALF_BYTES if fused else 0,
        quantized_bytes=round((parameters - half_parameters) * each + half_parameters * HALF_BYTES),
    )
