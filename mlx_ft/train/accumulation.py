"""Gradient accumulation as exact sums, and the optimizer update.

Does: cut a mini-batch into micro-batches; add up loss and gradient over an accumulation window;
divide once, clip, and update, unless something is not finite. Does not: choose rows, or save.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_map

from mlx_ft.data.tokens import Offsets, TokenizedSplit
from mlx_ft.engine.device import on_cpu
from mlx_ft.engine.load import scalar
from mlx_ft.errors import Fault, RecipeError
from mlx_ft.recipe.schema import TrainRecipe
from mlx_ft.train.numerics.batch import Batch, make_batch
from mlx_ft.train.numerics.forward import Forward
from mlx_ft.train.numerics.packing import packed_groups
from mlx_ft.train.numerics.trained_weights import trained_weights

OPTIMIZERS = {
    "adam": optimizers.Adam,
    "adamw": optimizers.AdamW,
    "muon": optimizers.Muon,
    "sgd": optimizers.SGD,
    "adafactor": optimizers.Adafactor,
    "lion": optimizers.Lion,
}
# By itself Adafactor ignores the learning rate, or scales it by the weights' size, which is nothing
# for a fresh adapter. Transformers' trainer uses it as here.
ADAFACTOR_BY_RATE = {"relative_step": False, "scale_parameter": False}
# Fixed cost of a group of rows (tokens that take the same time).
GROUP_COST_TOKENS = 16
# (batch, its prefix) -> the sum of its loss
LossOf = Callable[[Batch, mx.array], mx.array]
# (weights, arrays of a batch) -> loss and gradient
GradientOf = Callable[[Any, Mapping[str, mx.array]], tuple[mx.array, Any]]
# Sizes of batches whose compiled step is kept; one is a graph of some thousand nodes.
COMPILED_SIZES = 32


@dataclass(frozen=True)
class Update:
    """Outcome of an accumulation window.

    gradient_norm: norm of its mean gradient, before clipping.
    loss: its mean loss (nats per trained token).
    applied: the weights were changed.
    """

    gradient_norm: float
    loss: float
    applied: bool


def build_optimizer(train: TrainRecipe) -> optimizers.Optimizer:
    """Return the recipe's optimizer; RecipeError when it does not take the options."""
    options = ADAFACTOR_BY_RATE if train.optimizer == "adafactor" else {}
    try:
        return OPTIMIZERS[train.optimizer](
            learning_rate=train.learning_rate, **{**options, **train.optimizer_config}
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(
            Fault("train.optimizer_config", str(error), f"see mlx.optimizers.{train.optimizer}")
        ) from error


def micro_batches(
    split: TokenizedSplit, rows: Sequence[int], shared_tokens: int | None, limit_tokens: int
) -> Iterator[Batch]:
    """Yield the rows in batches of at most `limit_tokens`.

    shared_tokens: number of first tokens that all rows share, in packed batches (None: padded).
    """
    if shared_tokens is None:
        groups = padded_groups(split.lengths, rows, limit_tokens)
    else:
        groups = packed_groups(split.lengths, rows, shared_tokens, limit_tokens)
    return (make_batch(split, group, shared_tokens) for group in groups)


def padded_groups(
    lengths: Offsets, rows: Sequence[int], limit_tokens: int
) -> list[tuple[int, ...]]:
    """Return the rows, shortest first, in groups of at most `limit_tokens` padded tokens.

    The groups have the least cost: padding, and a fixed cost for each group. Sums do not depend on
    how rows are grouped, so this bounds memory and changes no result beyond float32 round-off. A
    row that is longer than the limit is a group of its own.
    """
    ordered = sorted(rows, key=lambda row: (int(lengths[row]), row))
    # For the first n of them: the least cost in tokens, and where the last group then begins.
    best = [(0, 0)]
    for end in range(1, len(ordered) + 1):
        longest = int(lengths[ordered[end - 1]])
        costs = []
        for first in range(end - 1, -1, -1):
            padded = longest * (end - first)
            if padded > limit_tokens and end - first > 1:
                break
            costs.append((best[first][0] + padded + GROUP_COST_TOKENS, first))
        best.append(min(costs))
    groups = []
    end = len(ordered)
    while end:
        first = best[end][1]
        groups.append(tuple(ordered[first:end]))
        end = first
    return groups[::-1]


def gradient_norm(gradient: Any) -> mx.array:
    """Return the Euclidean norm of all gradients together, in float32."""
    squares = [mx.square(array.astype(mx.float32)).sum() for _, array in tree_flatten(gradient)]
    return mx.sqrt(mx.sum(mx.stack(squares)))


@dataclass(frozen=True)
class StepForm:
    """Form of a step: it changes the time and memory that a step takes, and no result.

    dtype: type that the model computes in, where it is known.
    shares_inputs: adapters of layers with one input may share a product.
    compiled: loss and gradient are compiled, for each set of sizes.
    draws: the model draws random numbers (dropout).
    """

    dtype: mx.Dtype | None = None
    shares_inputs: bool = False
    compiled: bool = False
    draws: bool = False

    @staticmethod
    def of(train: TrainRecipe, forward: Forward) -> StepForm:
        """Return the form for a recipe; on a CPU, where kernels begin at once, the plainest."""
        if on_cpu():
            return StepForm()
        draws = train.lora_parameters.dropout > 0
        twice = train.grad_checkpoint or train.computes_inputs_again
        return StepForm(
            # A checkpointed layer is called again after the loss, with matrices of its own.
            None if train.grad_checkpoint else forward.dtype,
            shares_inputs=not (draws or twice),
            # Layers that are computed twice read the state that they draw from.
            compiled=not (draws and train.grad_checkpoint),
            draws=draws,
        )


class GradientWindow:
    """Sums of loss and gradient since the last update, and the update itself."""

    def __init__(
        self,
        model: nn.Module,
        loss: LossOf,
        optimizer: optimizers.Optimizer,
        max_gradient_norm: float | None,
        form: StepForm,
    ) -> None:
        self._loss = loss
        self._optimizer = optimizer
        self._max_norm = max_gradient_norm
        self._form = form
        self._functions: OrderedDict[Hashable, GradientOf] = OrderedDict()
        optimizer.init(model.trainable_parameters())  # a restored state lacks what is empty
        self._weights = trained_weights(model, optimizer, form.dtype, form.shares_inputs)
        # Scale, norm and optimizer are thousands of small kernels, and fused ones a quarter.
        self._step = mx.compile(self._step_of)
        self._clear()

    def _clear(self) -> None:
        self._gradient: Any = None
        self._losses: list[mx.array] = []
        self._weight = 0.0
        self.rows: tuple[int, ...] = ()

    def gradient(self, batch: Batch, prefix: mx.array) -> tuple[mx.array, Any]:
        """Return the sum of a micro-batch's loss (), and its gradient, not evaluated yet."""
        arrays, weights = batch.arrays | {"prefix": prefix}, self._weights.read()
        found = self._function_for(batch, arrays)(weights, arrays)
        # A layer that was called for the gradient has the arrays of that call.
        self._weights.put(weights)
        return found

    def _function_for(self, batch: Batch, arrays: Mapping[str, mx.array]) -> GradientOf:
        """Return the loss and gradient of (weights, arrays) for batches of these sizes."""

        def loss(weights: Any, arrays: Mapping[str, mx.array]) -> mx.array:
            with self._weights.computing(weights):
                return self._loss(batch.with_arrays(arrays), arrays["prefix"])

        function: GradientOf = mx.value_and_grad(loss)
        if not self._form.compiled:
            return function
        shared = None if batch.places is None else batch.places.shared
        key = shared, tuple((name, array.shape) for name, array in arrays.items())
        found = self._functions.pop(key, None)
        if found is None:
            random = [mx.random.state] if self._form.draws else None
            found = mx.compile(function, inputs=random, outputs=random)
        self._functions[key] = found  # the last used is the last to go
        if len(self._functions) > COMPILED_SIZES:
            self._functions.popitem(last=False)
        return found

    def add(self, batch: Batch, prefix: mx.array) -> mx.array:
        """Add a micro-batch; return the sum of its loss (), which may not be finite.

        A GPU is waited for at the update only, or before a further micro-batch: two at a time
        would need twice the memory.
        """
        if self._gradient is not None:
            mx.eval(self._gradient)
        loss, gradient = self.gradient(batch, prefix)
        if self._gradient is not None:
            gradient = tree_map(mx.add, self._gradient, gradient)
        if on_cpu():
            mx.eval(loss, gradient)
        else:
            mx.async_eval(loss, gradient)  # type: ignore[no-untyped-call]  # MLX has no type here
        self._gradient = gradient
        self._losses.append(loss)
        self._weight += batch.weight
        self.rows += batch.rows
        return self._losses[-1]

    def update(self, learning_rate: float) -> Update:
        """Change the weights by the window's mean gradient and begin a new window.

        When loss or gradient is not finite the weights stay as they are. Waits for the device once.
        """
        weight = self._weight or 1.0
        weights, state, norm = self._step(
            self._gradient,
            self._weights.read(),
            self._weights.read_state(self._optimizer),
            mx.array(weight),
            sum(self._losses[1:], self._losses[0]),
            mx.array(learning_rate),
        )
        mx.eval(weights, state, norm, self._losses)
        self._weights.put(weights)
        self._weights.put_state(self._optimizer, state)
        gradient_norm, loss = scalar(norm), sum(map(scalar, self._losses))
        result = Update(
            gradient_norm=gradient_norm,
            loss=loss / weight,
            applied=math.isfinite(gradient_norm) and math.isfinite(loss),
        )
        self._clear()
        return result

    def _step_of(
        self,
        gradient: Any,
        weights: Any,
        state: Any,
        weight: mx.array,
        loss: mx.array,
        rate: mx.array,
    ) -> tuple[Any, Any, mx.array]:
        """Return (weights, optimizer state, gradient norm) after an update, a pure function.

        gradient: its sum, over tokens of the sum of weights `weight`. loss: sum as well.
        """
        gradient = tree_map(lambda g: g / weight, gradient)
        norm = gradient_norm(gradient)
        if self._max_norm is not None:
            # Pascanu, Mikolov, Bengio, arXiv 1211.5063, section 3.2, algorithm 1.
            factor = mx.where(norm > self._max_norm, self._max_norm / norm, 1.0)
            gradient = tree_map(lambda g: g * factor, gradient)
        optimizer = self._optimizer
        optimizer.state = tree_map(lambda array: array, state)  # it is changed in place
        optimizer.state["learning_rate"] = rate
        changed = optimizer.apply_gradients(gradient, weights)
        finite = mx.isfinite(norm) & mx.isfinite(loss)

        def kept(new: mx.array, old: mx.array) -> mx.array:
            return mx.where(finite, new, old)

        return tree_map(kept, changed, weights), tree_map(kept, optimizer.state, state), norm
