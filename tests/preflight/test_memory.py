"""The memory forecast grows with what needs memory, and what it advises fits."""

from dataclasses import replace
from typing import Any

import pytest

from mlx_ft.model.shapes import ModelShape, model_shape
from mlx_ft.preflight.findings import PreflightInput
from mlx_ft.preflight.fit import (
    LADDER,
    changes_that_fit,
    fit_lines,
    fitting_sets,
    forecast,
    models_that_fit,
    usable_bytes,
    weights_held,
)
from mlx_ft.preflight.known_models import KNOWN_MODELS
from mlx_ft.preflight.memory import Weights, training_memory
from mlx_ft.recipe.schema import TrainRecipe
from tests.support.preflight_inputs import (
    MACHINE,
    SMOLLM2_135M,
    finding_of,
    quickstart,
    with_recipe,
)

# Billions of parameters, as the model cards say.
CARDS = {
    "SmolLM2-135M": 0.1345,
    "Qwen3-0.6B": 0.596,
    "Gemma-3-1B": 1.0,
    "Llama-3.2-1B": 1.236,
    "SmolLM2-1.7B": 1.711,
    "SmolLM3-3B": 3.08,
    "Llama-3.2-3B": 3.213,
    "Qwen3-4B": 4.02,
    "Mistral-7B-v0.3": 7.248,
    "Qwen2.5-7B": 7.616,
    "Llama-3.1-8B": 8.03,
    "Qwen3-8B": 8.19,
    "Qwen3-14B": 14.77,
    "Qwen3-32B": 32.76,
    "Qwen3-30B-A3B": 30.53,
}
FLOAT32 = Weights(4.0)


def small_shape() -> ModelShape:
    shape = model_shape(SMOLLM2_135M)
    assert shape is not None
    return shape


@pytest.mark.parametrize("name", CARDS)
def test_known_models_have_the_parameters_of_their_cards(name: str) -> None:
    shape = model_shape(KNOWN_MODELS[name])
    assert shape is not None
    assert shape.parameters / 1e9 == pytest.approx(CARDS[name], rel=0.01)


@pytest.mark.parametrize(
    "more",
    [
        {"batch_size": 8, "micro_batch_tokens": 4096},
        {"num_layers": 12},
        {"lora_parameters": {"rank": 64}},
        {"optimizer": "adamw", "lora_parameters": {"rank": 32}},
    ],
)
def test_more_of_anything_needs_more_memory(more: dict[str, Any]) -> None:
    def steps_of(**values: Any) -> int:
        train = TrainRecipe.model_validate({"num_layers": 8, **values})
        return training_memory(small_shape(), train, FLOAT32, 512, train.batch_size).steps_bytes

    assert steps_of(**more) > steps_of()


@pytest.mark.parametrize(
    "less", [{"grad_checkpoint": True}, {"micro_batch_tokens": 512}, {"low_memory": True}]
)
def test_what_saves_memory_is_seen_in_the_forecast(less: dict[str, Any]) -> None:
    def of(**values: Any) -> tuple[int, int]:
        train = TrainRecipe.model_validate({"num_layers": 8, "batch_size": 8, **values})
        found = training_memory(small_shape(), train, FLOAT32, 512, train.batch_size)
        return found.frozen_layers_bytes, found.steps_bytes

    assert of(**less) < of() or of(**less)[1] < of()[1]


def test_metal_holds_weights_as_stored_and_a_cpu_in_float32() -> None:
    facts, shape = quickstart(), small_shape()
    train = facts.recipe.train
    stored = facts.model_bytes / shape.parameters
    mac = replace(facts, machine=replace(MACHINE, system="Darwin"))
    assert weights_held(mac, shape, train) == Weights(stored, 2)
    assert weights_held(facts, shape, train) == FLOAT32
    frugal = train.model_copy(update={"low_memory": True})
    assert weights_held(facts, shape, frugal) == Weights(stored)


def test_full_training_computes_in_float32_on_metal_too() -> None:
    """So that only what is stored saves anything there."""
    full = TrainRecipe(num_layers=4, fine_tune_type="full")
    lora = TrainRecipe(num_layers=4)

    def saved(train: TrainRecipe) -> int:
        wide, half = (
            training_memory(small_shape(), train, Weights(2.0, each), 512, 4).steps_bytes
            for each in (4, 2)
        )
        return wide - half

    # Metal takes parts of logits whole, which is all that differs there.
    assert saved(full) < 0 < saved(lora)


def short_of_memory(facts: PreflightInput, share: float) -> PreflightInput:
    """Return the facts of a machine that has this share of what the training needs."""
    shape = small_shape()
    need = forecast(facts, shape, facts.recipe.train).peak_bytes
    memory = round(need * share / (usable_bytes("Linux", 10**12) / 10**12))
    return replace(facts, machine=replace(MACHINE, memory_bytes=memory))


def test_what_fits_is_left_alone() -> None:
    facts = short_of_memory(quickstart(), 1.01)
    assert changes_that_fit(facts, small_shape()) == {} and fitting_sets(facts) == ()


def test_what_is_advised_fits_and_nothing_cheaper_does() -> None:
    facts = with_recipe(quickstart(), "train", num_layers=24, batch_size=16, epochs=1)
    for share in (0.99, 0.9, 0.8, 0.7):
        short = short_of_memory(facts, share)
        changes = changes_that_fit(short, small_shape())
        assert changes, share
        limit = usable_bytes("Linux", short.machine.memory_bytes)
        train = short.recipe.train.model_copy(update=dict(changes))
        assert forecast(short, small_shape(), train).peak_bytes <= limit
        without_last = dict(list(changes.items())[:-1])
        cheaper = short.recipe.train.model_copy(update=without_last)
        assert forecast(short, small_shape(), cheaper).peak_bytes > limit
        advice = finding_of("memory", short).fix
        assert all(f"train.{key}: {value}" in advice for key, value in changes.items())


def test_where_nothing_helps_that_is_said() -> None:
    short = short_of_memory(quickstart(), 0.001)
    assert changes_that_fit(short, small_shape()) is None and fitting_sets(short) == ()
    assert "smaller model" in finding_of("memory", short).fix


def test_settings_are_written_as_a_recipe_reads_them() -> None:
    facts = with_recipe(quickstart(), "train", num_layers=-1, batch_size=16, epochs=1)
    sets = fitting_sets(short_of_memory(facts, 0.6))
    assert sets and all(text.startswith("train.") and "=" in text for text in sets)
    assert not any("True" in text for text in sets)


def test_more_memory_never_means_a_smaller_model() -> None:
    biggest = []
    for gigabytes in (4, 8, 16, 32, 64, 128):
        fitting = [f for f in models_that_fit(gigabytes * 10**9, 1024, 4) if f.settings]
        biggest.append(max((f.parameters for f in fitting), default=0))
        limit = usable_bytes("Darwin", gigabytes * 10**9)
        assert all(f.peak_bytes is not None and f.peak_bytes <= limit for f in fitting)
        assert all(f.settings in LADDER for f in fitting)
    assert biggest == sorted(biggest) and biggest[0] > 0


def test_the_table_names_every_model_and_the_biggest() -> None:
    lines = "\n".join(fit_lines(16 * 10**9, 1024, 4))
    assert all(name in lines for name in KNOWN_MODELS)
    assert "biggest" in lines and "none measured on a Mac" in lines
    assert "none of these" in "\n".join(fit_lines(10**7, 1024, 4))


def test_a_wired_limit_that_the_user_set_is_what_a_training_may_use() -> None:
    assert usable_bytes("Darwin", 16 * 10**9, 14 << 30) == 14 << 30
    assert usable_bytes("Darwin", 16 * 10**9, 64 << 30) == 16 * 10**9, "never more than there is"
