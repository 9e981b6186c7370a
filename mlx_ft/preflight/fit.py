"""`--fit`: find settings that fit in a machine's memory; list the models that fit.

Does: try changes from the cheapest on, with the forecast of `memory.py`.
Does not: change a recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from mlx_ft.model.shapes import ModelShape, model_shape
from mlx_ft.preflight.findings import PreflightInput
from mlx_ft.preflight.forecast import FLOAT32_BYTES, HALF_BYTES, quantized_bytes_each
from mlx_ft.preflight.known_models import KNOWN_MODELS
from mlx_ft.preflight.memory import MemoryForecast, Weights, training_memory
from mlx_ft.recipe.schema import TrainRecipe
from mlx_ft.system.hardware import Machine
from mlx_ft.text.quantities import format_bytes

# What one process may hold of a Mac's memory: the rest is the system's and the display's.
# Metal's own limit is two thirds up to 36 GB and three quarters above.
SMALL_MAC_BYTES, SMALL_MAC_SHARE, LARGE_MAC_SHARE = 36_000_000_000, 2 / 3, 3 / 4
OTHER_SHARE = 0.9
GROUP_SIZE = 64


def usable_bytes(system: str, memory_bytes: int, wired_limit_bytes: int = 0) -> int:
    """Return the part of a machine's memory that a training may use.

    wired_limit_bytes: the GPU's part where the user has set it (`iogpu.wired_limit_mb`), else 0.
    """
    if wired_limit_bytes:
        return min(wired_limit_bytes, memory_bytes)
    if system != "Darwin":
        return round(memory_bytes * OTHER_SHARE)
    share = SMALL_MAC_SHARE if memory_bytes <= SMALL_MAC_BYTES else LARGE_MAC_SHARE
    return round(memory_bytes * share)


def usable_here(machine: Machine) -> int:
    """Return the bytes of a machine's memory that a training may use."""
    return usable_bytes(machine.system, machine.memory_bytes, machine.wired_limit_bytes)


def weights_held(facts: PreflightInput, shape: ModelShape, train: TrainRecipe) -> Weights:
    """Return how weights are held in a training.

    On Metal, and with low_memory, they stay as stored; on Metal 16-bit numbers are computed. Else
    they are float32.
    """
    stored = facts.model_bytes / shape.parameters
    if facts.machine.system == "Darwin":
        return Weights(stored, HALF_BYTES)
    return Weights(stored if train.low_memory else FLOAT32_BYTES)


def forecast(facts: PreflightInput, shape: ModelShape, train: TrainRecipe) -> MemoryForecast:
    """Return the forecast for a recipe's rows and model, with these training settings."""
    held = weights_held(facts, shape, train)
    longest = int(facts.train_stats["longest_kept"])
    trained = float(facts.train_stats.get("trained_share", 1.0))
    return training_memory(shape, train, held, longest, min(train.batch_size, facts.rows), trained)


def changes_that_fit(facts: PreflightInput, shape: ModelShape) -> Mapping[str, Any] | None:
    """Return the settings of `train` to change so that the training fits.

    None when nothing here helps; an empty mapping when nothing has to change.
    Tried one on top of the other. First those that change no result: fewer tokens at a time,
    activations computed twice, frozen weights read again. Then fewer layers.
    """
    limit = usable_here(facts.machine)
    changes: dict[str, Any] = {}
    for more in ({}, *_cheaper(facts, shape)):
        changes.update(more)
        train = facts.recipe.train.model_copy(update=changes)
        if forecast(facts, shape, train).peak_bytes <= limit:
            return changes
    return None


def _cheaper(facts: PreflightInput, shape: ModelShape) -> Iterator[dict[str, Any]]:
    train = facts.recipe.train
    longest = int(facts.train_stats["longest_kept"])
    if train.micro_batch_tokens > longest and train.batch_size > 1:
        yield {"micro_batch_tokens": longest}
    if not train.grad_checkpoint:
        yield {"grad_checkpoint": True}
    layers = len(shape.layers) if train.num_layers < 0 else train.num_layers
    if not train.low_memory and layers < len(shape.layers):
        yield {"low_memory": True}
    while layers > 4:
        layers //= 2
        yield {"num_layers": layers, "low_memory": True}


@dataclass(frozen=True)
class Fitting:
    """A model, its parameters, and the settings it can be trained with and the bytes at the peak of
    that, or None twice.
    """

    model: str
    parameters: int
    settings: Mapping[str, Any] | None
    peak_bytes: int | None


# From what learns most to what needs least.
LADDER: Sequence[Mapping[str, Any]] = (
    {"num_layers": -1, "batch_size": 4},
    {"num_layers": 16, "batch_size": 4},
    {"num_layers": 16, "batch_size": 1},
    {"num_layers": 16, "batch_size": 1, "grad_checkpoint": True},
    {"num_layers": 16, "batch_size": 1, "grad_checkpoint": True, "low_memory": True},
    {"num_layers": 8, "batch_size": 1, "grad_checkpoint": True, "low_memory": True},
    {"num_layers": 4, "batch_size": 1, "grad_checkpoint": True, "low_memory": True},
)


def models_that_fit(memory_bytes: int, tokens: int, bits: int) -> list[Fitting]:
    """Return for each known model, smallest first, the first settings of LADDER that fit a Mac.

    tokens: the longest row.
    bits: of the base.
    """
    limit = usable_bytes("Darwin", memory_bytes)
    stored = HALF_BYTES if bits == 16 else quantized_bytes_each(bits, GROUP_SIZE)
    found = []
    for name, config in KNOWN_MODELS.items():
        shape = model_shape(config)
        assert shape is not None, f"{name} is of a kind that is known"
        found.append(_first_that_fits(name, shape, Weights(stored, HALF_BYTES), tokens, limit))
    return sorted(found, key=lambda each: each.parameters)


def _first_that_fits(
    name: str, shape: ModelShape, weights: Weights, tokens: int, limit: int
) -> Fitting:
    for settings in LADDER:
        if settings["num_layers"] >= len(shape.layers):
            continue
        at_once = tokens * int(settings["batch_size"])
        train = TrainRecipe(**settings, micro_batch_tokens=at_once)
        peak = training_memory(shape, train, weights, tokens, train.batch_size).peak_bytes
        if peak <= limit:
            return Fitting(name, shape.parameters, settings, peak)
    return Fitting(name, shape.parameters, None, None)


def fit_lines(memory_bytes: int, tokens: int, bits: int) -> Iterator[str]:
    """Yield the table of `models_that_fit` for people, and the biggest that does."""
    fitting = models_that_fit(memory_bytes, tokens, bits)
    rows = [
        [each.model, f"{each.parameters / 1e9:.2f} B", *_columns(each.settings, each.peak_bytes)]
        for each in fitting
    ]
    headers = ("model", "parameters", "layers", "batch", "what else", "peak, forecast")
    yield tabulate(rows, headers, disable_numparse=True)
    usable = format_bytes(usable_bytes("Darwin", memory_bytes))
    yield (
        f"\n{bits}-bit base, rows of up to {tokens:,} tokens, rank 8; Metal lets a process use "
        f"{usable} of {format_bytes(memory_bytes)}. Forecasts from shapes, none measured on a Mac."
        " They are of training alone: the export holds the 16-bit model in memory."
    )
    there = [each for each in fitting if each.settings is not None]
    yield f"biggest  {there[-1].model if there else 'none of these'}"


def _columns(settings: Mapping[str, Any] | None, peak_bytes: int | None) -> tuple[str, ...]:
    if settings is None or peak_bytes is None:
        return "-", "-", "does not fit", "-"
    layers = "all" if settings["num_layers"] < 0 else f"top {settings['num_layers']}"
    others = [name for name, value in settings.items() if value is True]
    return layers, str(settings["batch_size"]), ", ".join(others), format_bytes(peak_bytes)


def fitting_sets(facts: PreflightInput) -> tuple[str, ...]:
    """Return the `KEY=VALUE` settings that let a training fit into this machine's memory; none when
    it fits, its model's shape is not known, or nothing helps.
    """
    shape = model_shape(facts.model_config)
    changes = None if shape is None else changes_that_fit(facts, shape)
    return tuple(
        f"train.{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in (changes or {}).items()
    )
