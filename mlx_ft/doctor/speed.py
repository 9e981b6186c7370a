"""Time and memory of a training step here: beside mlx-lm's, and of the built-in model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_ft.doctor.checks import Check
from mlx_ft.doctor.miniature import LORA, Step, adapt, miniature
from mlx_ft.engine.load import load_weights, release
from mlx_ft.model.shapes import ModelShape, model_shape
from mlx_ft.preflight.known_models import KNOWN_MODELS
from mlx_ft.text.quantities import format_bytes, format_seconds
from mlx_ft.train.numerics.forward import choose_forward

STEPS, WARM_UP, ROWS = 20, 3, (128, 128, 128, 128)
BUILTIN_STEPS, BUILTIN_LAYERS = 4, 12
BIG, BIG_LAYERS = "Llama-3.2-3B", 12
# Rows, tokens a row and epochs of the forecast.
RUN_ROWS, RUN_TOKENS, RUN_EPOCHS = 1000, 256, 2


@dataclass(frozen=True)
class Pace:
    """Seconds a step, and the memory at its peak (bytes)."""

    seconds: float
    peak_memory_bytes: int


def paced(take: Callable[[], Any], steps: int) -> Pace:
    """Return the mean of some steps, after others that compile."""
    for _ in range(WARM_UP):
        take()
    mx.reset_peak_memory()
    started = time.perf_counter()
    for _ in range(steps):
        take()
    return Pace((time.perf_counter() - started) / steps, int(mx.get_peak_memory()))


def _ours() -> Pace:
    model = miniature()
    recipe = adapt(model, 1)
    forward = choose_forward(model, 1, [list(range(3, ROWS[0] + 3))])
    return paced(Step.of(model, recipe, forward, ROWS).take, STEPS)


def _theirs() -> Pace:
    """Return the pace of mlx-lm's loss, gradient and update, compiled as its loop compiles them."""
    model = miniature()
    model.freeze()
    linear_to_lora_layers(model, 1, LORA)
    model.train()
    optimizer = optimizers.Adam(1e-3)
    optimizer.init(model.trainable_parameters())
    loss_and_gradient = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(ids: mx.array, ends: mx.array) -> Any:
        (loss, tokens), gradient = loss_and_gradient(model, ids, ends)
        optimizer.update(model, gradient)
        return loss, tokens

    ids = mx.zeros((len(ROWS), max(ROWS) + 1), mx.int32)
    ends = mx.array([[length // 2, length] for length in ROWS])

    def take() -> None:
        mx.eval(state, step(ids, ends))

    return paced(take, STEPS)


def beside_mlx_lm() -> Check:
    """Time 20 steps on the top layer of the miniature, and 20 of mlx-lm's on the same."""
    theirs = _theirs()
    release()
    ours = _ours()
    release()
    ratio = ours.seconds / theirs.seconds
    figures = {
        "seconds_a_step": ours.seconds,
        "mlx_lm_seconds_a_step": theirs.seconds,
        "peak_memory_bytes": ours.peak_memory_bytes,
        "mlx_lm_peak_memory_bytes": theirs.peak_memory_bytes,
    }
    found = (
        f"{1e3 * ours.seconds:.1f} ms a step, mlx-lm {1e3 * theirs.seconds:.1f} ms; "
        f"{format_bytes(ours.peak_memory_bytes)}, mlx-lm {format_bytes(theirs.peak_memory_bytes)}"
    )
    if ratio > 1:
        advice = "let nothing else compute meanwhile, and ask again; if it stays so, tell us"
        return Check("steps", "warn", found, advice, figures)
    return Check("steps", "ok", found, "", figures)


def products_a_token(shape: ModelShape, layers: int) -> float:
    """Return the multiplications that a trained token takes: forward, and backward to its inputs,
    through the top layers and the head.
    """
    top = [module for layer in shape.layers[-layers:] for module in layer]
    head = shape.vocabulary * shape.hidden_size
    return 2.0 * (sum(module.parameters for module in top) + head)


def builtin_pace(folder: Path | None) -> Check:
    """Time steps of the built-in model; forecast those of a 3B model by the multiplications."""
    name = "built-in model"
    if folder is None:
        advice = "mlx-ft rehearse recipes/quickstart.yaml fetches it; then ask again"
        return Check(name, "warn", "not measured: the model is not in the cache", advice)
    model, config, _ = load_weights(folder)
    recipe = adapt(model, BUILTIN_LAYERS)
    forward = choose_forward(model, BUILTIN_LAYERS, [list(range(3, ROWS[0] + 3))])
    pace = paced(Step.of(model, recipe, forward, ROWS).take, BUILTIN_STEPS)
    del model, forward
    release()
    tokens_per_second = sum(ROWS) / pace.seconds
    small, big = model_shape(config), model_shape(KNOWN_MODELS[BIG])
    assert small is not None and big is not None, "both are of kinds that are known"
    factor = products_a_token(big, BIG_LAYERS) / products_a_token(small, BUILTIN_LAYERS)
    big_tokens_per_second = tokens_per_second / factor
    seconds = RUN_EPOCHS * RUN_ROWS * RUN_TOKENS / big_tokens_per_second
    figures = {
        "tokens_per_second": tokens_per_second,
        "peak_memory_bytes": pace.peak_memory_bytes,
        "forecast_3b_tokens_per_second": big_tokens_per_second,
        "forecast_3b_run_seconds": seconds,
    }
    found = (
        f"{tokens_per_second:,.0f} tokens/s with {BUILTIN_LAYERS} layers; forecast for {BIG}, "
        f"{BIG_LAYERS} layers: {big_tokens_per_second:,.0f} tokens/s, "
        f"{RUN_EPOCHS} epochs of {RUN_ROWS:,} rows of {RUN_TOKENS} tokens in "
        f"{format_seconds(seconds)} (by its multiplications; not measured)"
    )
    return Check(name, "ok", found, "", figures)
