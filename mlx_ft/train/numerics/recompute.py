"""Activation checkpointing: compute activations twice instead of keeping them.

Does: checkpoint a whole layer, or recompute only the adapters' cheap inputs. Does not: decide which
layers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.lora import LoRALinear

from mlx_ft.engine.adapters import NarrowLoRALinear
from mlx_ft.engine.cpu_kernels import fast_math
from mlx_ft.engine.partial_model import standing_in
from mlx_ft.train.numerics.custom_vjp import Function, with_gradient

RANDOM_STATE: Any = mx.random.state  # a list of one array, which its type does not say


@contextmanager
def drawing_from(state: mx.array) -> Iterator[None]:
    """Within, draw random numbers from this state of MLX's generator; restore it afterwards.

    When the state is the present one already, it is not restored.
    """
    before = RANDOM_STATE[0]
    if before is state:
        yield
        return
    _set_random_state(state)
    yield
    _set_random_state(before)


def _set_random_state(state: mx.array) -> None:
    high, low = map(int, np.array(state))  # a seed's upper and lower 32 bits
    mx.random.seed(high << 32 | low)


def checkpointed(
    layer: nn.Module, within: Callable[[nn.Module], AbstractContextManager[None]]
) -> nn.Module:
    """Return a stand-in for a layer that computes its activations again in the backward pass.

    It has the same parameters, and keeps only its input (Chen et al., arXiv 1604.06174).
    within: context in which the layer runs, both times.
    """

    def call(_: nn.Module, *arguments: Any, **named: Any) -> mx.array:
        drawn_from = RANDOM_STATE[0]

        def compute(parameters: Any, *arguments: Any) -> mx.array:
            layer.update(parameters)
            # The second time no caller provides the context, and dropout must draw the same masks.
            with fast_math(layer), within(layer), drawing_from(drawn_from):
                outputs: mx.array = layer(*arguments, **named)
            return outputs

        result: mx.array = mx.checkpoint(compute)(layer.trainable_parameters(), *arguments)
        return result

    return standing_in(layer, "Checkpointed", call)


@dataclass(frozen=True)
class _Source:
    """Recipe of an array: `made` = function(first). Holding `made` keeps its identity unique."""

    made: mx.array
    first: mx.array
    function: Callable[[mx.array], mx.array]

    def again(self, after: mx.array) -> mx.array:
        """Return the array computed once more, not before `after` is there."""
        return self.function(mx.depends(self.first, after))


@contextmanager
def keep_inputs_of_gates(model: nn.Module) -> Iterator[None]:
    """Within, gates (SwiGLU) keep their two inputs alone, and compute the rest again.

    A gate and its gradient are then one fused kernel each where MLX compiles, and a layer keeps
    two numbers fewer for each of its inner width.
    """
    modules = {type(module).__module__ for module in model.modules()}
    places = [vars(sys.modules[name]) for name in modules if name in sys.modules]
    before = [(place, place["swiglu"]) for place in places if "swiglu" in place]
    for place, gate in before:
        place["swiglu"] = _gate_again(gate)
    try:
        yield
    finally:
        for place, gate in before:
            place["swiglu"] = gate


@contextmanager
def recompute_cheap_inputs(model: nn.Module) -> Iterator[None]:
    """Within, LoRA layers keep no input that is the output of a norm or a gate.

    Their gradients compute it again, in the same bits; gates keep only their inputs. Layers with
    dropout must not be among them.

    In a layer like Llama's this saves nearly half of the kept activations for little work
    (selective recomputation: Korthikanti et al., arXiv 2205.05198, section 5). Such an input is
    recognised as the very array that MLX's norm, or mlx-lm's gate, returned; others are kept.
    """
    sources: dict[int, _Source] = {}
    place = vars(sys.modules[type(model).__module__])
    norm, gate = mx.fast.rms_norm, place.get("swiglu")
    kinds: tuple[Any, ...] = (LoRALinear, NarrowLoRALinear)
    projects = {kind: kind.__call__ for kind in kinds}
    mx.fast.rms_norm = _noting(norm, sources)
    for kind, project in projects.items():
        kind.__call__ = _projecting(project, sources)
    if gate is not None:
        place["swiglu"] = _noting(_gate_again(gate), sources)
    try:
        yield
    finally:
        mx.fast.rms_norm = norm
        for kind, project in projects.items():
            kind.__call__ = project
        if gate is not None:
            place["swiglu"] = gate


def _noting(function: Function, sources: dict[int, _Source]) -> Function:
    """Return a function that notes the source of each output: its first argument."""

    def noted(first: mx.array, *others: Any, **named: Any) -> mx.array:
        output = function(first, *others, **named)
        sources[id(output)] = _Source(
            output, first, lambda again: function(again, *others, **named)
        )
        return output

    return noted


def _gate_again(gate: Function) -> Function:
    """Return a gate whose gradient needs its inputs alone."""

    def gradient(inputs: tuple[mx.array, ...], slope: mx.array) -> tuple[mx.array, ...]:
        first, *others = inputs
        return tuple(mx.vjp(gate, [mx.depends(first, slope), *others], [slope])[1])

    return with_gradient(gate, gradient)


def _projecting(project: Function, sources: dict[int, _Source]) -> Function:
    """Return the call of LoRA layers that compute an input again where its source is known."""

    def call(self: nn.Module, hidden: mx.array) -> mx.array:
        source = sources.get(id(hidden))
        if source is None:
            return project(self, hidden)

        held = copy.copy(self)  # as it is now: the gradient is computed when it may be otherwise

        def projected(hidden: mx.array, lora_a: mx.array, lora_b: mx.array) -> mx.array:
            twin = copy.copy(held)
            twin.lora_a, twin.lora_b = lora_a, lora_b
            return project(twin, hidden)

        def gradient(inputs: tuple[mx.array, ...], slope: mx.array) -> tuple[mx.array, ...]:
            _, *weights = inputs
            return tuple(mx.vjp(projected, [source.again(slope), *weights], [slope])[1])

        return with_gradient(projected, gradient)(hidden, self.lora_a, self.lora_b)

    return call
