"""Forecast the peak memory of a training from shapes alone.

Does: add up weights, adapter, optimizer, activations and logits in each part of a training.
Does not: measure, judge, or know how much memory a machine has.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_ft.model.shapes import ModelShape, Module
from mlx_ft.preflight.forecast import (
    FLOAT32_BYTES,
    OPTIMIZER_STATES,
    adapted_layers,
    trainable_parameters,
)
from mlx_ft.recipe.schema import TrainRecipe
from mlx_ft.recipe.train import LOGITS_PART_BYTES, PREFIX_GROUP_TOKENS

# Logits are made in parts (LOGITS_PART_BYTES), of which a CPU, which takes a row at a time,
# has about four (measured); Metal, which takes them whole, eight (measured on a CPU that did so).
# Where there are fewer positions, about twice what they take.
CPU_LOGITS_PARTS, METAL_LOGITS_PARTS = 4, 8
LOGITS_ARRAYS = 2
# Layers whose values are there at once in a forward pass.
PREFIX_LAYERS = 2
# Of a mixture, the usual number of experts that each token goes through.
EXPERTS_A_TOKEN = 8


@dataclass(frozen=True)
class Weights:
    """How weights are held: bytes for each parameter, and for each number that is computed."""

    stored_bytes_each: float
    computed_bytes_each: int = FLOAT32_BYTES

    @property
    def logits_bytes(self) -> int:
        """The most that logits take at once. Only Metal computes in 16 bits."""
        on_cpu = self.computed_bytes_each == FLOAT32_BYTES
        return LOGITS_PART_BYTES * (CPU_LOGITS_PARTS if on_cpu else METAL_LOGITS_PARTS)


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes at the peak of the two parts of a training: while the frozen layers are there, and
    while steps are made.
    """

    frozen_layers_bytes: int
    steps_bytes: int

    @property
    def peak_bytes(self) -> int:
        return max(self.frozen_layers_bytes, self.steps_bytes)


def training_memory(
    shape: ModelShape, train: TrainRecipe, weights: Weights, longest: int, rows_at_once: int
) -> MemoryForecast:
    """Return the forecast of a training whose longest row has `longest` tokens, of at most
    `rows_at_once` rows in a mini-batch.
    """
    top = [module for layer in adapted_layers(shape, train) for module in layer]
    of_top = _parameters(top) * weights.stored_bytes_each
    of_roots = _parameters(shape.roots) * weights.stored_bytes_each
    whole = of_top + of_roots if train.low_memory else shape.parameters * weights.stored_bytes_each
    adapter = trainable_parameters(shape, train) * FLOAT32_BYTES
    tokens = min(rows_at_once * longest, max(longest, train.micro_batch_tokens))
    # While frozen layers are there, so is the adapter; nothing is kept for a backward pass.
    group = max(longest, min(PREFIX_GROUP_TOKENS, tokens))
    frozen = whole + adapter + PREFIX_LAYERS * group * _widest(shape) * weights.computed_bytes_each
    logits = min(tokens * shape.vocabulary * FLOAT32_BYTES * LOGITS_ARRAYS, weights.logits_bytes)
    # Weights that are all trained are held in float32, and so is what they are multiplied with.
    full = train.fine_tune_type == "full"
    computed = FLOAT32_BYTES if full else weights.computed_bytes_each
    forward = _activations(shape, train, tokens, longest) * computed + logits
    # When gradients are whole, activations are gone; an update then makes parameters and states.
    update = adapter * (2 + OPTIMIZER_STATES[train.optimizer])
    held = of_top + of_roots if len(adapted_layers(shape, train)) < len(shape.layers) else whole
    held += adapter * (1 + OPTIMIZER_STATES[train.optimizer])
    if train.grad_accumulation_steps > 1 or rows_at_once * longest > tokens:
        held += adapter  # the sum of gradients so far
    return MemoryForecast(round(frozen), round(held + max(forward, update)))


def _parameters(modules: list[Module] | tuple[Module, ...]) -> int:
    return sum(module.parameters for module in modules)


def _widest(shape: ModelShape) -> int:
    """Return the numbers that one token's values are within a layer, all of them together."""
    return _saved_a_token(shape.layers[-1], shape.hidden_size, inputs_again=False)


def _saved_a_token(layer: tuple[Module, ...], hidden: int, inputs_again: bool) -> int:
    """Return how many numbers of a token a layer keeps for its backward pass.

    The residual stream twice and its norms (4 hidden). Queries and their outputs, keys and values.
    Gate, its sigmoid, up and their product. Of these, norms, sigmoid and product can be computed
    again from the others.
    """
    width = {module.name.rsplit(".", 1)[-1]: module.outputs for module in layer}
    experts = max((module.experts for module in layer), default=1)
    inner = width.get("gate_proj", 4 * hidden) * (1 if experts == 1 else EXPERTS_A_TOKEN)
    attention = 2 * width["q_proj"] + width["k_proj"] + width["v_proj"]
    copies = 2 if inputs_again else 4
    return copies * (hidden + inner) + attention


def _activations(shape: ModelShape, train: TrainRecipe, tokens: int, longest: int) -> int:
    """Return the numbers that a forward pass keeps for the backward pass.

    Those of every trained layer; with checkpoints, the input of each and all numbers of one.
    """
    layers = len(adapted_layers(shape, train))
    saved = _saved_a_token(shape.layers[-1], shape.hidden_size, train.computes_inputs_again)
    # Attention keeps its exponentials, those under the causal mask's diagonal in blocks.
    of_layer = tokens * (saved + shape.heads * longest // 2)
    backward = tokens * _widest(shape)
    if train.grad_checkpoint:
        return of_layer + backward + tokens * shape.hidden_size * layers
    return of_layer * layers + backward
