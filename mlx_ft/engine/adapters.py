"""Attach a LoRA or DoRA adapter to a loaded model, strictly.

Does not: create or save adapters (`train/adapters.py`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
        given: Matrices | None = vars(self).get(GIVEN)
        if given is None:
            outputs: mx.array = LoRALinear.__call__(_rounded(self, hidden.dtype), hidden)
            return outputs
        if given.product is None:
            narrow = self.dropout(hidden) @ self.lora_a
        else:
            narrow = given.product.part(hidden, given.index)
        wide = self.linear(hidden)
        # As rows: MLX would repeat the matrix, and its gradient, for each row of a batch.
        rows = mx.addmm(_as_rows(wide), _as_rows(narrow), self.lora_b)
        return rows.reshape(wide.shape)


class NarrowLoRASwitchLinear(LoRASwitchLinear):  # type: ignore[misc]  # as above
    """The same for the experts of a mixture."""

    def __call__(self, hidden: mx.array, *arguments: Any, **named: Any) -> mx.array:
        outputs: mx.array = LoRASwitchLinear.__call__(
            _rounded(self, hidden.dtype), hidden, *arguments, **named
        )
        return outputs


NARROW = {LoRALinear: NarrowLoRALinear, LoRASwitchLinear: NarrowLoRASwitchLinear}


GIVEN = "_given_matrices"


class SharedProduct:
    """Product of one input with the first matrices, side by side, of layers that all have it."""

    def __init__(self, matrix: mx.array, layers: int) -> None:
        self._matrix = matrix
        self._layers = layers
        self._input: mx.array | None = None
        self._parts: list[mx.array] = []

    def part(self, hidden: mx.array, index: int) -> mx.array:
        """Return a layer's part of the product; computed anew for another input than the last."""
        if hidden is not self._input:
            self._input = hidden
            self._parts = list(mx.split(hidden @ self._matrix, self._layers, axis=-1))
        return self._parts[index]


@dataclass(frozen=True, eq=False)
class Matrices:
    """LoRA matrices in the type that computes, with the scale in the second one.

    product: of the layers that share the input, and the layer's `index` among them. The `first`
        matrix is then that of them all. None: the layer computes its own.
    """

    first: mx.array
    second: mx.array
    product: SharedProduct | None
    index: int


@contextmanager
def computing_with(
    given: Mapping[str, Matrices], layers: Mapping[str, nn.Module]
) -> Iterator[None]:
    """Within, each of the layers computes with the matrices of its name instead of its own."""
    own = {name: (layer.lora_a, layer.lora_b) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.lora_a, layer.lora_b = given[name].first, given[name].second
        vars(layer)[GIVEN] = given[name]
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.lora_a, layer.lora_b = own[name]
            del vars(layer)[GIVEN]


def _as_rows(array: mx.array) -> mx.array:
    return array.reshape(-1, array.shape[-1])


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
