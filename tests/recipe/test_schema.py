"""The recipe's own rules: what a value may be, what two values may not be together."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mlx_ft.recipe.fields import number_from_text, optimizer_updates
from mlx_ft.recipe.keys import (
    SYNONYMS,
    dotted,
    meant_keys,
    section_keys,
    section_of,
    squeezed,
    value_at,
    value_keys,
)
from mlx_ft.recipe.optimizers import OPTIMIZER_OPTIONS, optimizer_option_faults
from mlx_ft.recipe.schema import LoraParameters, LrSchedule, Recipe, TrainRecipe

SMALLEST: dict[str, Any] = {"name": "x", "model": "m", "data": {"path": "d"}}


def recipe(**train: Any) -> Recipe:
    return Recipe.model_validate({**SMALLEST, "train": train})


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_written_as_text_is_that_number(number: float) -> None:
    assert number_from_text(repr(number)) == number


@given(st.text())
def test_reading_a_number_from_any_text_never_fails(text: str) -> None:
    assert isinstance(number_from_text(text), str | int | float)


@pytest.mark.parametrize(
    "text", ["", ".", "e5", "1e", "0x10", "010", "1__0", "nan", "inf", "٣", " 1"]
)
def test_what_is_no_plain_decimal_number_stays_text(text: str) -> None:
    assert number_from_text(text) == text


def test_a_learning_rate_in_quotes_is_a_number() -> None:
    assert recipe(learning_rate="1e-5").train.learning_rate == 1e-5


@pytest.mark.parametrize("wrong", [True, 1.5, "four", None, [4], float("inf"), "1e300", 2**40])
def test_a_count_is_a_whole_number_and_nothing_else(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        recipe(batch_size=wrong)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), "nan", "1e999", True, 0, -1])
def test_a_learning_rate_is_finite_and_positive(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        recipe(learning_rate=wrong)


def test_a_recipe_without_a_length_has_two_epochs_and_one_with_iters_has_none() -> None:
    assert recipe().train.epochs == 2
    assert recipe(epochs=None, iters=None).train.epochs == 2
    assert recipe(iters=5).train.epochs is None


@given(st.floats(0.1, 100), st.integers(1, 64))
def test_the_effective_scale_is_alpha_over_rank_or_the_scale(strength: float, rank: int) -> None:
    assert LoraParameters(rank=rank, alpha=strength).effective_scale == strength / rank
    assert LoraParameters(rank=rank, scale=strength).effective_scale == strength
    assert LoraParameters(rank=rank).effective_scale == 2.0


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"epochs": 1, "iters": 1}, "epochs and iters are both given"),
        ({"num_layers": 0}, "nothing would be trained"),
        ({"val_batches": 0}, "nothing would be validated"),
        ({"lora_parameters": {"alpha": 1, "scale": 1}}, "alpha and scale are both given"),
        ({"lr_schedule": {"warmup_steps": 1, "warmup_ratio": 0.1}}, "are both given"),
        ({"lr_schedule": {"warmup_init": 1e-7}}, "there is no warm-up"),
        ({"lr_schedule": {"name": "cosine", "cycles": 2}}, "cosine has no cycles"),
        ({"lr_schedule": {"decay_steps": 3}}, "does not decay"),
        ({"lr_schedule": {"end": 1e-6}}, "does not decay"),
        ({"lr_schedule": {"name": "linear", "end": 1}}, "above the peak"),
        ({"iters": 9, "lr_schedule": {"warmup_steps": 9}}, "is as long as the run"),
        ({"iters": 9, "lr_schedule": {"warmup_steps": 10}}, "is longer than the run"),
        ({"iters": 1, "lr_schedule": {"warmup_ratio": 0.1}}, "warm-up of 1 optimizer updates is"),
        (
            {
                "iters": 16,
                "grad_accumulation_steps": 2,
                "lr_schedule": {"name": "cosine", "decay_steps": 9},
            },
            "16 iters make 8 optimizer updates",
        ),
        ({"optimizer": "adam", "optimizer_config": {"weight_decay": 0.1}}, "has no option"),
        ({"optimizer": "adamw", "optimizer_config": {"betas": 0.9}}, "two numbers"),
        ({"optimizer": "sgd", "optimizer_config": {"nesterov": 1}}, "true or false"),
        ({"optimizer": "muon", "optimizer_config": {"ns_steps": 1.5}}, "a whole number"),
        ({"optimizer": "adamw", "optimizer_config": {"eps": 10**400}}, "a number"),
    ],
)
def test_values_that_cannot_be_true_together_are_refused(train: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        recipe(**train)


def test_a_schedule_may_outlast_the_run_when_the_recipe_says_so() -> None:
    schedule = LrSchedule(name="cosine", decay_steps=90, allow_unfinished=True)
    assert TrainRecipe(iters=9, lr_schedule=schedule).lr_schedule.decay_steps == 90


def test_lists_of_the_evaluation_name_nothing_twice() -> None:
    with pytest.raises(ValidationError, match="base is given twice"):
        Recipe.model_validate({**SMALLEST, "eval": {"columns": ["base", "base"]}})


def test_a_recipe_cannot_be_changed() -> None:
    train: Any = recipe().train
    with pytest.raises(ValidationError, match="frozen"):
        train.seed = 1


@given(st.integers(1, 10_000), st.integers(1, 100))
def test_updates_cover_all_mini_batches_and_no_more(iters: int, accumulation: int) -> None:
    updates = optimizer_updates(iters, accumulation)
    assert (updates - 1) * accumulation < iters <= updates * accumulation


def test_the_optimizer_options_are_those_of_mlx() -> None:
    import mlx.optimizers as optimizers

    classes = {name.lower(): getattr(optimizers, name) for name in dir(optimizers)}
    for name, options in OPTIMIZER_OPTIONS.items():
        parameters = inspect.signature(classes[name]).parameters
        assert set(parameters) - {"learning_rate"} == set(options), name
        for option, kind in options.items():
            default = parameters[option].default
            assert isinstance(default, bool) == (kind == "true or false"), (name, option)
            assert isinstance(default, list | tuple) == (kind == "two numbers"), (name, option)


NUMBERS = st.sampled_from([-1.0, 0.0, 0.5, 0.999, 1.0, 2.0])
ANY_OPTIONS = st.sampled_from(sorted(OPTIMIZER_OPTIONS)).flatmap(
    lambda optimizer: st.tuples(
        st.just(optimizer),
        st.fixed_dictionaries(
            {},
            optional={
                name: {
                    "a number": NUMBERS,
                    "a whole number": st.integers(0, 3),
                    "two numbers": st.lists(NUMBERS, min_size=2, max_size=2),
                    "true or false": st.booleans(),
                }[kind]
                for name, kind in OPTIMIZER_OPTIONS[optimizer].items()
            },
        ),
    )
)


@given(ANY_OPTIONS)
def test_an_optimizer_takes_the_options_that_have_no_fault(given: tuple[str, Any]) -> None:
    """Found out before a model is loaded, and not by the optimizer afterwards."""
    from mlx_ft.train.accumulation import build_optimizer

    optimizer, options = given
    values = {"optimizer": optimizer, "optimizer_config": options}
    try:
        train = Recipe.model_validate({**SMALLEST, "train": values}).train
    except ValidationError:
        assert optimizer_option_faults(optimizer, options)
        return
    build_optimizer(train)


@pytest.mark.parametrize(
    ("optimizer", "options", "found"),
    [
        ("sgd", {"nesterov": True}, "nesterov needs momentum"),
        ("sgd", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "and no dampening"),
        ("adam", {"betas": [1.5, 2]}, "betas is"),
        ("adam", {"eps": -1}, "eps is -1"),
        ("adafactor", {"relative_step": True}, "instead of train.learning_rate"),
    ],
)
def test_options_that_an_optimizer_refuses_or_that_undo_the_recipe(
    optimizer: str, options: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValidationError, match=found):
        Recipe.model_validate(
            {**SMALLEST, "train": {"optimizer": optimizer, "optimizer_config": options}}
        )


def test_every_value_key_leads_to_a_value() -> None:
    keys = list(value_keys())
    assert len(keys) == len(set(keys))
    for key in keys:
        value_at(recipe(), key)
        assert section_of(key) is None


def test_every_synonym_means_a_key_that_exists_and_is_not_a_key_itself() -> None:
    known = {dotted(key) for key in [*value_keys(), *section_keys()]}
    assert set(SYNONYMS.values()) <= known
    assert all(squeezed(name) == name for name in SYNONYMS)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("learning_rate", "train.learning_rate"),
        ("train.lr", "train.learning_rate"),
        ("train.learning-rate", "train.learning_rate"),
        ("train.max_length", "data.max_seq_length"),
        ("train.lora_rank", "train.lora_parameters.rank"),
        ("lora_alpha", "train.lora_parameters.alpha"),
        ("target_modules", "train.lora_parameters.keys"),
        ("train.batchsize", "train.batch_size"),
        ("train.gradient_accumulation_steps", "train.grad_accumulation_steps"),
        ("modle", "model"),
        ("trian", "train"),
        ("train.lora_parametres", "train.lora_parameters"),
        ("eval.colums", "eval.columns"),
    ],
)
def test_a_misspelt_or_misplaced_key_is_recognised(written: str, meant: str) -> None:
    assert meant_keys(tuple(written.split("."))) == [meant]


def test_a_key_that_two_sections_have_suggests_both() -> None:
    assert meant_keys(("batch_size",)) == ["train.batch_size", "eval.batch_size"]


@given(st.lists(st.text(min_size=1), min_size=1, max_size=3))
def test_looking_for_what_was_meant_never_fails(key: list[str]) -> None:
    known = {dotted(each) for each in [*value_keys(), *section_keys()]}
    assert set(meant_keys(tuple(key))) <= known
