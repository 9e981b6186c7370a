"""Attach a LoRA or DoRA adapter to a loaded model, strictly.

Does not: create or save adapters (`train/adapters.py`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_ft.errors import Fault, ModelError


def attach_adapter(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Put the adapter in `folder` (mlx-lm's format) on the model and return its config.

    The set of tensor names and every shape must be equal; raises ModelError with all differences.
    mlx-lm itself leaves a layer without its tensors untouched.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        weights = mx.load(str(folder / "adapters.safetensors"))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            Fault(str(folder), f"no readable adapter ({error})", "train it again")
        ) from error
    assert isinstance(weights, dict)
    model.freeze()
    make_trainable_layers(model, config)
    expected = {name: array.shape for name, array in tree_flatten(model.trainable_parameters())}
    faults = adapter_faults(folder, expected, {name: a.shape for name, a in weights.items()})
    if faults:
        raise ModelError(faults)
    model.load_weights(list(weights.items()), strict=False)
    model.eval()
    # What lies under the adapter is not touched: it may be meant to be read later.
    mx.eval(model.trainable_parameters())
    return dict(config)


def make_trainable_layers(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Unfreeze the layers that an adapter_config.json of mlx-lm's form trains, on a frozen model.

    These are LoRA or DoRA layers that are put on its top layers, or all weights of those (`full`).
    Raises ValueError for modules that mlx-lm has no such layer for.
    """
    kind, layers = config.get("fine_tune_type", "lora"), config["num_layers"]
    if kind == "full":
        for layer in model.layers[-layers:]:
            layer.unfreeze()
        return
    linear_to_lora_layers(model, layers, config["lora_parameters"], use_dora=kind == "dora")


class NarrowLoRALinear(LoRALinear):  # type: ignore[misc]  # mlx-lm has no type information
    """LoRA layer that computes in its input's type, with its own matrices in float32.

    A float32 matrix makes MLX widen the input, and a training keeps that copy: 4 more bytes a
    number. The matrices alone are rounded here, and their gradients come back in float32.
    """

    def __call__(self, hidden: mx.array) -> mx.array:
        outputs: mx.array = LoRALinear.__call__(_rounded(self, hidden.dtype), hidden)
        return outputs


class NarrowLoRASwitchLinear(LoRASwitchLinear):  # type: ignore[misc]  # as above
    """The same for the experts of a mixture."""

    def __call__(self, hidden: mx.array, *arguments: Any, **named: Any) -> mx.array:
        outputs: mx.array = LoRASwitchLinear.__call__(
            _rounded(self, hidden.dtype), hidden, *arguments, **named
        )
        return outputs


NARROW = {LoRALinear: NarrowLoRALinear, LoRASwitchLinear: NarrowLoRASwitchLinear}


def _rounded(layer: nn.Module, dtype: mx.Dtype) -> nn.Module:
    twin = copy.copy(layer)
    twin.lora_a, twin.lora_b = layer.lora_a.astype(dtype), layer.lora_b.astype(dtype)
    return twin


def compute_in_input_type(model: nn.Module) -> None:
    """Make the LoRA layers of a model compute in the type of what they are given.

    Not for a CPU, where float32 is the fast type.
    """
    for module in model.modules():
        narrow = NARROW.get(type(module))
        if narrow is not None:
            module.__class__ = narrow


def adapter_faults(
    folder: Path,
    expected: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
) -> list[Fault]:
    """Return a fault each for adapter tensors that are missing, unknown, or of another shape.

    Each names the first such tensor, and how many more there are.
    """
    shared = expected.keys() & found.keys()
    other = [name for name in shared if tuple(expected[name]) != tuple(found[name])]
    groups: tuple[tuple[Collection[str], Callable[[str], str]], ...] = (
        (expected.keys() - found.keys(), lambda name: "missing from the adapter"),
        (found.keys() - expected.keys(), lambda name: "not a tensor of this model's adapter"),
        (other, lambda name: f"shape {found[name]}, the model needs {expected[name]}"),
    )
    fix = "use the adapter with the model and layers it was trained on"
    faults = []
    for names, in_words in groups:
        if names:
            first, more = min(names), len(names) - 1
            rest = f"; and {more} more like it" if more else ""
            faults.append(Fault(f"{folder}: {first}", f"{in_words(first)}{rest}", fix))
    return faults
