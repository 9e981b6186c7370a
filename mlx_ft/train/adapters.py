"""Create, save and load adapters, in mlx-lm's format.

Does not: train them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_ft.engine.adapters import (
    adapter_faults,
    compute_in_input_type,
    make_trainable_layers,
)
from mlx_ft.engine.device import on_cpu
from mlx_ft.errors import Fault, GateFailed, ModelError, RecipeError
from mlx_ft.recipe.schema import Recipe, TrainRecipe

ADAPTER_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"
# Modules that mlx-lm turns into LoRA layers, beside those with their own `to_lora`.
LORA_MODULES = (
    nn.Linear,
    nn.QuantizedLinear,
    SwitchLinear,
    QuantizedSwitchLinear,
    nn.Embedding,
    nn.QuantizedEmbedding,
)


@dataclass(frozen=True)
class AdapterShape:
    """Size of an adapter.

    num_layers: adapted layers, from the top.
    modules: names of the trained modules.
    trainable_parameters, total_parameters: counts.
    """

    num_layers: int
    modules: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int


def resolve_num_layers(num_layers: int, available: int) -> int:
    """Return the number of adapted layers; -1 is all. Raises RecipeError beyond the model's."""
    if num_layers > available:
        raise RecipeError(
            Fault(
                "train.num_layers",
                f"{num_layers}, but the model has {available} layers",
                f"use 1 to {available}, or -1 for all",
            )
        )
    return available if num_layers == -1 else num_layers


def adapter_config(recipe: Recipe, num_layers: int) -> dict[str, Any]:
    """Return adapter_config.json: the keys from which mlx-lm rebuilds the layers, and no others."""
    kind, lora = recipe.train.fine_tune_type, recipe.train.lora_parameters
    if kind == "full":
        return {"fine_tune_type": kind, "model": recipe.model, "num_layers": num_layers}
    parameters: dict[str, Any] = {
        "rank": lora.rank,
        "scale": lora.effective_scale,
        "dropout": lora.dropout,
    }
    if lora.keys is not None:
        parameters["keys"] = list(lora.keys)
    return {
        "fine_tune_type": kind,
        "model": recipe.model,
        "num_layers": num_layers,
        "lora_parameters": parameters,
    }


def make_trainable(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Unfreeze, on a frozen model, the weights that an adapter_config.json trains.

    Raises RecipeError where mlx-lm has no such layers.
    """
    try:
        make_trainable_layers(model, config)
    except ValueError as error:
        raise RecipeError(
            Fault("train.fine_tune_type", str(error), "use fine_tune_type: lora")
        ) from error


def _check_keys(model: nn.Module, keys: list[str]) -> None:
    within = [found for layer in model.layers for found in layer.named_modules()]
    outside = [found for found in model.named_modules() if "layers" not in found[0].split(".")]
    known = sorted(
        {
            name
            for name, module in (*within, *outside)
            if isinstance(module, LORA_MODULES) or hasattr(module, "to_lora")
        }
    )
    faults = []
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            faults.append(
                Fault(
                    "train.lora_parameters.keys",
                    f"{key} is no module of this model that takes an adapter",
                    f"{hint}one of {', '.join(known)}",
                )
            )
    if faults:
        raise RecipeError(faults)


def put_adapter(model: nn.Module, train: TrainRecipe, config: dict[str, Any]) -> AdapterShape:
    """Put a fresh adapter on the top layers, drawn from `train.seed`, and freeze all other weights.

    Full fine-tuning unfreezes all weights of these layers instead.
    """
    total = sum(int(array.size) for _, array in tree_flatten(model.parameters()))
    if train.lora_parameters.keys is not None:
        _check_keys(model, train.lora_parameters.keys)
    model.freeze()
    mx.random.seed(train.seed)
    make_trainable(model, config)
    _hold_in_float32(model)
    if not on_cpu():
        compute_in_input_type(model)
    trainable = tree_flatten(model.trainable_parameters())
    if not trainable:
        raise RecipeError(
            Fault(
                "train.lora_parameters.keys",
                f"none of them is in the top {config['num_layers']} layers of the model",
                "raise train.num_layers, or name modules that these layers have",
            )
        )
    modules = sorted({name.rsplit(".", 1)[0] for name, _ in trainable})
    count = sum(int(array.size) for _, array in trainable)
    return AdapterShape(config["num_layers"], tuple(modules), count, total)


def _hold_in_float32(model: nn.Module) -> None:
    """Widen trainable weights of 16 bits: small updates of a bfloat16 are rounded away, and Adam's
    squared gradients underflow in float16 (Micikevicius et al., arXiv 1710.03740, section 3.1).
    """
    model.load_weights(
        [
            (name, array.astype(mx.float32))
            for name, array in tree_flatten(model.trainable_parameters())
            if array.dtype in (mx.float16, mx.bfloat16)
        ],
        strict=False,
    )


def take_adapter_off(model: nn.Module, own: Mapping[str, nn.Module]) -> bool:
    """Restore a model's own modules in place of the adapter's; return whether it has no others now.

    own: the modules by name, as they were before `put_adapter`.
    """
    leaves = [(name, module) for name, module in own.items() if not tree_flatten(module.children())]
    try:
        model.update_modules(tree_unflatten(leaves))
    except ValueError:  # a model whose parts lie elsewhere once they are adapted
        return False
    now = dict(model.named_modules())
    return now.keys() == own.keys() and all(now[name] is own[name] for name in own)


def require_finite(arrays: Mapping[str, mx.array], what: str) -> None:
    """Raise GateFailed when an array to be written holds a non-finite number."""
    broken = [name for name, array in arrays.items() if not bool(mx.isfinite(array).all().item())]
    if broken:
        raise GateFailed(
            Fault(
                f"{what} {broken[0]}",
                f"{len(broken)} of {len(arrays)} tensors are not finite",
                "lower train.learning_rate; the last good checkpoint is kept",
            )
        )


def save_adapter(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write the two files of an adapter; GateFailed rather than write a non-finite number."""
    weights = dict(tree_flatten(model.trainable_parameters()))
    require_finite(weights, "adapter tensor")
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / ADAPTER_FILE), weights)
    text = json.dumps(config, indent=4, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_adapter_weights(model: nn.Module, file: Path) -> None:
    """Load adapter weights into the layers that `put_adapter` made, in these layers' precision.

    Raises ModelError unless names and shapes are equal.
    """
    try:
        # For any file name: MLX's readers of other formats are not safe for untrusted files.
        weights = mx.load(str(file), format="safetensors")
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(Fault(str(file), f"not readable ({error})", "check the path")) from error
    assert isinstance(weights, dict)
    own = dict(tree_flatten(model.trainable_parameters()))
    expected = {name: array.shape for name, array in own.items()}
    faults = adapter_faults(file, expected, {name: a.shape for name, a in weights.items()})
    if faults:
        raise ModelError(faults)
    model.load_weights([(name, a.astype(own[name].dtype)) for name, a in weights.items()], False)
