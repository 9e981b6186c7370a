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
from mlx_ft.recipe.train import GPU_LOGITS_PART_BYTES, LOGITS_PART_BYTES, PREFIX_GROUP_TOKENS

# Logits are made in parts, of which a CPU, which takes a row at a time, has about four (measured);
# a GPU has two: the logits in both types, and then their slope (measured on a CPU in a GPU's way).
# Where there are fewer positions, a CPU has about twice what all tokens' would take, and a GPU
# twice what those of the trained tokens do.
CPU_LOGITS_PARTS, GPU_LOGITS_ARRAYS = 4, 2
CPU_LOGITS_ARRAYS = 2
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
    def on_gpu(self) -> bool:
        """Only a GPU computes in 16 bits."""
        return self.computed_bytes_each < FLOAT32_BYTES

    @property
    def logits_bytes(self) -> int:
        """The most that logits take at once."""
        if self.on_gpu:
            return GPU_LOGITS_PART_BYTES * GPU_LOGITS_ARRAYS
        return LOGITS_PART_BYTES * CPU_LOGITS_PARTS


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
    shape: ModelShape,
    train: TrainRecipe,
    weights: Weights,
    longest: int,
    rows_at_once: int,
    trained_share: float = 1.0,
) -> MemoryForecast:
    """Return the forecast of a training whose longest row has `longest` tokens, of at most
    `rows_at_once` rows in a mini-batch.

    trained_share: of all tokens, those that are trained.
    """
    top = [module for layer in adapted_layers(shape, train) for module in layer]
    of_top = _parameters(top) * weights.stored_bytes_each
    of_roots = _parameters(shape.roots) * weights.stored_bytes_each
    whole = of_top + of_roots if train.low_memory else shape.parameters * weights.stored_bytes_each
    adapter = trainable_parameters(shape, train) * FLOAT32_BYTES
    tokens = min(rows_at_once * longest, max(longest, train.micro_batch_tokens))
    # While frozen layers are there, so is the adapter; nothing is kept for a backward pass.
    group = max(longest, min(PREFIX_GROUP_TOKENS, tokens))
    widest = _widest(shape, weights.on_gpu)
    frozen = whole + adapter + PREFIX_LAYERS * group * widest * weights.computed_bytes_each
    at_once = GPU_LOGITS_ARRAYS * trained_share if weights.on_gpu else CPU_LOGITS_ARRAYS
    logits = min(tokens * shape.vocabulary * FLOAT32_BYTES * at_once, weights.logits_bytes)
    # Weights that are all trained are held in float32, and so is what they are multiplied with.
    full = train.fine_tune_type == "full"
    computed = FLOAT32_BYTES if full else weights.computed_bytes_each
    states = OPTIMIZER_STATES[train.optimizer]
    if weights.on_gpu:
        kept, backward = _activations(shape, train, tokens, longest, on_gpu=True)
        # Nothing of the backward pass is there yet when the logits are. The adapter's copy in 16
        # bits is, and that of its gradient.
        forward = kept * computed + max(logits, backward * computed) + adapter
        # One compiled step: gradient, mean, clipped; parameters and states, changed and chosen.
        update = adapter * (4 + 2 * (1 + states))
    else:
        kept, backward = _activations(shape, train, tokens, longest, on_gpu=False)
        forward = (kept + backward) * computed + logits
        # When gradients are whole, activations are gone; an update makes parameters and states.
        update = adapter * (2 + states)
    held = of_top + of_roots if len(adapted_layers(shape, train)) < len(shape.layers) else whole
    held += adapter * (1 + states)
    if train.grad_accumulation_steps > 1 or rows_at_once * longest > tokens:
        held += adapter  # the sum of gradients so far
    return MemoryForecast(round(frozen), round(held + max(forward, update)))


def _parameters(modules: list[Module] | tuple[Module, ...]) -> int:
    return sum(module.parameters for module in modules)


def _widest(shape: ModelShape, on_gpu: bool) -> int:
    """Return the numbers that one token's values are within a layer, all of them together."""
    return _saved_a_token(shape.layers[-1], shape.hidden_size, False, on_gpu)


def _saved_a_token(layer: tuple[Module, ...], hidden: int, inputs_again: bool, on_gpu: bool) -> int:
    """Return how many numbers of a token a layer keeps for its backward pass.

    The residual stream twice and its norms (4 hidden). Queries and their outputs, keys and values.
    Gate, its sigmoid, up and their product. Of these, norms, sigmoid and product can be computed
    again from the others; on a GPU the sigmoid always is.
    """
    width = {module.name.rsplit(".", 1)[-1]: module.outputs for module in layer}
    experts = max((module.experts for module in layer), default=1)
    inner = width.get("gate_proj", 4 * hidden) * (1 if experts == 1 else EXPERTS_A_TOKEN)
    attention = 2 * width["q_proj"] + width["k_proj"] + width["v_proj"]
    if inputs_again:
        return 2 * (hidden + inner) + attention
    return 4 * hidden + (3 if on_gpu else 4) * inner + attention


def _activations(
    shape: ModelShape, train: TrainRecipe, tokens: int, longest: int, *, on_gpu: bool
) -> tuple[int, int]:
    """Return the numbers that a forward pass keeps for the backward pass, and those that the
    backward pass of a layer adds.

    Those of every trained layer; with checkpoints, the input of each, and all numbers of one later.
    """
    layers = len(adapted_layers(shape, train))
    again = train.computes_inputs_again
    saved = _saved_a_token(shape.layers[-1], shape.hidden_size, again, on_gpu)
    # A CPU's attention keeps its exponentials, those under the causal mask's diagonal in blocks.
    of_layer = tokens * (saved if on_gpu else saved + shape.heads * longest // 2)
    backward = tokens * _widest(shape, on_gpu)
    if train.grad_checkpoint:
        return tokens * shape.hidden_size * layers, of_layer + backward
    return of_layer * layers, backward
