"""A LoRA adapter as one vector, which a GPU trains with few kernels.

Does: lay all matrices out in one float32 vector; give the layers their matrices in 16 bits, from
one rounding of it; join the products of layers that have the same input. Then the norm, the
optimizer and the rounding of a gradient take a kernel each, not one for every matrix.
Does not: change what is computed. A model's own parameters are views of the vector between steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_ft.engine.adapters import Matrices, NarrowLoRALinear, SharedProduct, computing_with
from mlx_ft.train.numerics.custom_vjp import parts_of

# Layers of one parent that mlx-lm's models call with the same input.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Block:
    """LoRA layers with one input: their first matrices side by side, (inputs, layers x rank).

    names: of the layers, in the model.
    """

    names: tuple[str, ...]
    inputs: int
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.inputs, self.rank * len(self.names)


class FlatAdapter:
    """Layout of a model's LoRA matrices in one vector: all first ones, then all second ones.

    shares_inputs: layers of one input have one product; not where layers are computed twice.
    """

    def __init__(self, model: nn.Module, shares_inputs: bool) -> None:
        self._layers = _lora_layers(model)
        self._shares_inputs = shares_inputs
        self.blocks = tuple(_blocks(self._layers))
        self._outputs = {name: layer.lora_b.shape for name, layer in self._layers.items()}
        self._sizes_a = [math.prod(block.shape) for block in self.blocks]
        self._ordered = [name for block in self.blocks for name in block.names]
        self._sizes_b = [math.prod(self._outputs[name]) for name in self._ordered]
        (self._scale,) = {layer.scale for layer in self._layers.values()}

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Return whether a model trains LoRA matrices alone, of one scale, that a GPU rounds."""
        layers = _lora_layers(model)
        names = {f"{name}.lora_{letter}" for name in layers for letter in "ab"}
        trained = dict(tree_flatten(model.trainable_parameters()))
        return (
            bool(layers)
            and trained.keys() == names
            and len({layer.scale for layer in layers.values()}) == 1
            and all(array.dtype == mx.float32 for array in trained.values())
        )

    def pack(self, arrays: Mapping[str, mx.array]) -> mx.array:
        """Return the vector of arrays that are named and shaped as the model's matrices."""
        first = [
            mx.concatenate([arrays[f"{name}.lora_a"] for name in block.names], axis=1).reshape(-1)
            for block in self.blocks
        ]
        second = [arrays[f"{name}.lora_b"].reshape(-1) for name in self._ordered]
        return mx.concatenate(first + second)

    def unpack(self, vector: mx.array) -> dict[str, mx.array]:
        """Return the views of a vector by the names of the model's matrices."""
        first, second = self._halves(vector)
        blocks = parts_of(first, self._sizes_a)
        found: dict[str, mx.array] = {}
        for block, array in zip(self.blocks, blocks, strict=True):
            parts = parts_of(array.reshape(block.shape), [block.rank] * len(block.names), axis=1)
            found |= {f"{n}.lora_a": part for n, part in zip(block.names, parts, strict=True)}
        for name, array in zip(self._ordered, parts_of(second, self._sizes_b), strict=True):
            found[f"{name}.lora_b"] = array.reshape(self._outputs[name])
        return found

    def _halves(self, vector: mx.array) -> list[mx.array]:
        return parts_of(vector, [sum(self._sizes_a), sum(self._sizes_b)])

    @contextmanager
    def computing(self, vector: mx.array, dtype: mx.Dtype) -> Iterator[None]:
        """Within, the model's layers compute with the matrices of a vector, rounded to a type.

        The scale is in the second ones.
        """
        all_first, second = self._halves(vector)
        blocks = parts_of(all_first.astype(dtype), self._sizes_a)
        scaled = (second * self._scale).astype(dtype)
        of_second = dict(zip(self._ordered, parts_of(scaled, self._sizes_b), strict=True))
        given = {}
        for block, array in zip(self.blocks, blocks, strict=True):
            whole, layers = array.reshape(block.shape), len(block.names)
            shared = self._shares_inputs and layers > 1
            product = SharedProduct(whole, layers) if shared else None
            # A part that is not used would have a gradient of zeros, of the whole's size.
            firsts = [whole] * layers if shared else parts_of(whole, [block.rank] * layers, axis=1)
            for index, (name, first) in enumerate(zip(block.names, firsts, strict=True)):
                matrix = of_second[name].reshape(self._outputs[name])
                given[name] = Matrices(first, matrix, product, index)
        with computing_with(given, self._layers):
            yield


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    return {
        name: module for name, module in model.named_modules() if type(module) is NarrowLoRALinear
    }


def _blocks(layers: Mapping[str, Any]) -> Iterator[Block]:
    """Yield the layers in blocks of one input, in the order of the model."""
    left = dict(layers)
    while left:
        name = next(iter(left))
        parent, _, own = name.rpartition(".")
        siblings = next((names for names in SIBLINGS if own in names), (own,))
        names = [f"{parent}.{sibling}" if parent else sibling for sibling in siblings]
        shape = left[name].lora_a.shape
        block = tuple(n for n in names if n in left and left[n].lora_a.shape == shape)
        yield Block(block, *shape)
        for each in block:
            del left[each]
