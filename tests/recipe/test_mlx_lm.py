"""mlx-lm's flat form: read as mlx-lm means it, said key by key, refused where it cannot be kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_ft.errors import RecipeError
from mlx_ft.recipe.keys import dotted, value_keys
from mlx_ft.recipe.load import LoadedRecipe, load_recipe
from mlx_ft.recipe.mlx_lm import from_mlx_lm, is_mlx_lm_form
from mlx_ft.recipe.mlx_lm_keys import (
    DEFAULT_ADAPTER_PATH,
    FLAT_KEYS,
    LORA_DEFAULTS,
    MLX_LM_DEFAULT,
    NO_EFFECT,
    RESTRICTED,
    SAME_MEANING,
)
from mlx_ft.recipe.schema import TrainRecipe
from mlx_ft.recipe.write import dump_resolved, upgrade_text
from mlx_ft.train.schedules import learning_rate_at
from tests.support.paths import ROOT

OURS = ROOT / "tests" / "fixtures" / "mlx_lm_lora_config.yaml"
UPSTREAM = ROOT.parent / "shared" / "clients" / "mlx_lm_lora_config.yaml"
MINIMAL = {"model": "m", "data": "d", "train": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flat")


def load(folder: Path, flat: dict[str, Any], *sets: str) -> LoadedRecipe:
    path = folder / "flat.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **flat}, sort_keys=False))
    return load_recipe(path, sets)


def faults(folder: Path, flat: dict[str, Any], *sets: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(folder, flat, *sets)
    return [str(fault).replace(f"{folder}/", "") for fault in caught.value.faults]


def same_after_a_round_trip(loaded: LoadedRecipe, folder: Path) -> bool:
    """Return whether the loaded file, written out as a recipe both ways, loads as an equal one."""
    path = folder / "again.yaml"
    recipes = []
    for text in (dump_resolved(loaded), upgrade_text(loaded)):
        path.write_text(text, encoding="utf-8")
        again = load_recipe(path)
        assert again.form == "recipe"
        recipes.append(again.recipe)
    return recipes == [loaded.recipe, loaded.recipe]


def test_our_example_is_read_as_mlx_lm_means_it(folder: Path) -> None:
    loaded = load_recipe(OURS)
    train, data = loaded.recipe.train, loaded.recipe.data
    assert loaded.form == "mlx-lm"
    assert loaded.adapter_path == Path("adapters/try")
    assert loaded.recipe.model == "base_model"
    assert loaded.recipe.eval.suites == []
    assert (data.path, data.max_seq_length, data.mask_prompt) == ("folder/with/rows", 2048, True)
    assert (train.iters, train.epochs, train.grad_accumulation_steps) == (1000, None, 2)
    assert train.lora_parameters.effective_scale == 20.0
    assert train.lora_parameters.keys == ["self_attn.q_proj", "self_attn.v_proj"]
    assert train.optimizer == "adamw"
    assert train.optimizer_config == {
        "betas": [0.9, 0.98],
        "eps": 1e-6,
        "weight_decay": 0.05,
        "bias_correction": True,
    }
    assert train.learning_rate == 1e-5
    assert train.lr_schedule.model_dump(exclude_defaults=True) == {
        "name": "cosine",
        "warmup_steps": 100,
        "warmup_init": 1e-7,
        "decay_steps": 1000,
        "end": 1e-7,
        "allow_unfinished": True,
    }
    assert same_after_a_round_trip(loaded, folder)


def test_every_key_of_a_file_is_spoken_of(folder: Path) -> None:
    notes = "\n".join(load_recipe(OURS).notes)
    for key, value in yaml.safe_load(OURS.read_text()).items():
        assert f"\n{key}" in f"\n{notes}" or value is None, key
    assert "iters: 1000 mini-batches = 500 optimizer updates" in notes
    assert "lora_parameters.scale: 20.0, kept as scale" in notes
    assert "optimizer_config.sgd: not used, the optimizer is adamw" in notes


@pytest.mark.skipif(not UPSTREAM.exists(), reason="mlx-lm's own example is not here")
def test_the_example_of_mlx_lm_runs_unchanged(folder: Path) -> None:
    loaded = load_recipe(UPSTREAM)
    values = yaml.safe_load(UPSTREAM.read_text())
    assert loaded.form == "mlx-lm"
    assert loaded.recipe.train.iters == values["iters"]
    assert loaded.recipe.train.learning_rate == float(values["learning_rate"])
    assert loaded.recipe.train.lora_parameters.scale == values["lora_parameters"]["scale"]
    assert loaded.adapter_path == Path(values["adapter_path"])
    assert same_after_a_round_trip(loaded, folder)


def test_the_defaults_are_those_of_the_installed_mlx_lm() -> None:
    from mlx_lm.lora import CONFIG_DEFAULTS

    for key, (_, default) in SAME_MEANING.items():
        expected = None if key == "data" else CONFIG_DEFAULTS[key]
        assert (default, type(default)) == (expected, type(expected)), key
    assert dict(LORA_DEFAULTS) == CONFIG_DEFAULTS["lora_parameters"]
    assert CONFIG_DEFAULTS["adapter_path"] == DEFAULT_ADAPTER_PATH
    assert set(CONFIG_DEFAULTS) <= FLAT_KEYS
    for key in RESTRICTED:
        default = CONFIG_DEFAULTS.get(key)
        assert default is None or default in RESTRICTED[key][0], key
    assert not set(NO_EFFECT) & set(SAME_MEANING)


def test_the_schedule_is_that_of_mlx_lm() -> None:
    """mlx-lm stays at the peak for one update more between warm-up and decay; else all equal."""
    from mlx_lm.tuner.utils import build_schedule

    for name, arguments in (
        ("cosine_decay", [1e-3, 40, 1e-5]),
        ("cosine_decay", [1e-3, 40]),
        ("linear_schedule", [1e-3, 1e-5, 40]),
    ):
        for warmup in (0, 10):
            schedule = {"name": name, "arguments": arguments, "warmup": warmup}
            theirs = build_schedule({**schedule, "warmup_init": 1e-7})
            translation = from_mlx_lm({**MINIMAL, "lr_schedule": schedule}, {}, "f")
            values = translation.values["train"]
            values["lr_schedule"]["warmup_init"] = 1e-7 if warmup else 0.0
            train = TrainRecipe.model_validate(values)
            ours = learning_rate_at(train.lr_schedule, train.learning_rate, 30)
            for update in range(60):
                late = 1 if warmup and update > warmup else 0
                assert ours(update) == pytest.approx(
                    float(theirs(update + late)), rel=1e-4, abs=1e-9
                )


def test_what_a_file_leaves_out_is_mlx_lms_default(folder: Path) -> None:
    loaded = load(folder, {"iters": 7, "val_batches": None})
    origins = loaded.origins
    assert set(origins) == {dotted(key) for key in value_keys()}
    assert loaded.recipe.data.mask_prompt is False
    assert loaded.recipe.train.val_batches == 25
    assert loaded.recipe.train.lora_parameters.scale == 20.0
    assert origins["data.mask_prompt"] == origins["train.val_batches"] == MLX_LM_DEFAULT
    assert origins["train.iters"].endswith("flat.yaml:4")
    assert origins["export.q_bits"] == "default"
    assert loaded.adapter_path == Path("adapters")
    assert "val_batches 25" in loaded.notes[-1]


def test_a_dataset_of_the_hub_is_read_with_mlx_lms_own_splits(folder: Path) -> None:
    given = {"path": "org/name", "config": {"name": "small"}, "prompt_feature": "question"}
    data = load(folder, {"hf_dataset": given}).recipe.data
    assert data.path == "hf:org/name" and data.hf.config == "small"
    assert (data.hf.train_split, data.hf.valid_split) == ("train[:80%]", "train[-10%:]")
    assert data.fields == {"prompt": "question"}
    given = {"path": "org/name", "train_split": "train[:9]", "valid_split": "validation"}
    data = load(folder, {"hf_dataset": given}).recipe.data
    assert (data.hf.train_split, data.hf.valid_split) == ("train[:9]", "validation")


@pytest.mark.parametrize("outside", [None, False, True])
def test_what_a_dataset_of_the_hub_says_of_masks_and_tests_is_spoken_of(
    folder: Path, outside: bool | None
) -> None:
    """mlx-lm puts its own mask_prompt over the dataset's, and reads test_split for a test alone."""
    from mlx_lm.tuner.datasets import load_custom_hf_dataset

    given = {"path": "org/name", "mask_prompt": not outside, "test_split": "test[:5%]"}
    loaded = load(folder, {"hf_dataset": given, "mask_prompt": outside})
    theirs = SimpleNamespace(hf_dataset=dict(given), train=False, test=False, mask_prompt=outside)
    load_custom_hf_dataset(theirs, None)
    assert theirs.hf_dataset["mask_prompt"] == outside
    assert loaded.recipe.data.mask_prompt is bool(outside)
    notes = "\n".join(loaded.notes)
    said = "true, no effect; as in mlx-lm the mask_prompt outside counts, false"
    if outside:
        said = "false, no effect; as in mlx-lm the mask_prompt outside counts, true"
    assert f"hf_dataset.mask_prompt: {said}" in notes
    assert "hf_dataset.test_split: test[:5%], no effect without test: true" in notes
    quiet = load(folder, {"hf_dataset": {"path": "org/name"}}).notes
    assert not [note for note in quiet if note.startswith("hf_dataset.")]


def test_other_names_of_a_rows_parts_are_taken_over(folder: Path) -> None:
    features = {"prompt_feature": "q", "completion_feature": "completion", "chat_feature": "turns"}
    assert load(folder, features).recipe.data.fields == {"prompt": "q", "messages": "turns"}


REFUSED = [
    ({"training_mode": "dpo"}, "training_mode: 'dpo' trains on preferences"),
    ({"test": True}, "test: true asks for the loss on test.jsonl"),
    ({"hf_dataset": [{"path": "x"}, {"path": "y"}]}, "hf_dataset: 2 datasets are not offered"),
    ({"hf_dataset": {"path": "x", "pat": "y"}}, "did you mean path?"),
    ({"hf_dataset": {"train_split": "train"}}, "hf_dataset.path: null is no name"),
    ({"hf_dataset": {"path": "x", "config": {"data_dir": "y"}}}, "data_dir is not offered"),
    ({"report_to": "wandb,comet"}, "report_to"),
    ({"trust_remote_code": True}, "trust_remote_code: true would run code"),
    ({"learning-rate": 1}, "learning-rate: is not a known key; mlx-lm ignores it silently"),
    ({"lr": 1}, "did you mean learning_rate?"),
    ({"batchsize": 1}, "did you mean batch_size?"),
    ({"steps_per_save": 1}, "did you mean save_every?"),
    ({"lora_layers": 1}, "did you mean num_layers?"),
    ({"lora_rank": 1}, "did you mean lora_parameters.rank?"),
    ({"name": "x"}, "name: is not a known key"),
    ({"lora_parameters": {"r": 1}}, "lora_parameters.r: is not a known key"),
    ({"lora_parameters": {"alfa": 1}}, "did you mean alpha?"),
    ({"lora_parameters": 3}, "lora_parameters: 3 is not a section"),
    ({"lora_parameters": {"alpha": 1, "scale": 1}}, "alpha and scale are both given"),
    ({"optimizer_config": 3}, "optimizer_config: 3 is not a section"),
    ({"optimizer_config": {"adam": {"weight_decay": 1}}}, "adam has no option weight_decay"),
    ({"lr_schedule": {"arguments": [1]}}, "lr_schedule.name: is missing"),
    ({"lr_schedule": {"name": ["x"], "arguments": [1]}}, "is not offered"),
    ({"lr_schedule": {"name": "exponential_decay", "arguments": [1, 2]}}, "is not offered"),
    ({"lr_schedule": {"name": "step_decay", "arguments": [1, 2, 3]}}, "is not offered"),
    ({"lr_schedule": {"name": "cosine_decay", "arguments": [1]}}, "does not fit cosine_decay"),
    ({"lr_schedule": {"name": "linear_schedule", "arguments": [0, 1, 9]}}, "rises from 0 to 1"),
    (
        {"lr_schedule": {"name": "cosine_decay", "arguments": [1, 0]}},
        "lr_schedule.arguments: 0 is out of range",
    ),
    ({"batch_size": True}, "flat.yaml:4 batch_size: true is not a whole number"),
    ({"adapter_path": 3}, "adapter_path: 3 is not a folder"),
    ({"train": 3, "iters": 1}, "train: 3 is not true or false"),
    ({"data": None}, "data: is missing; mlx-lm's default is a data set on the Hub"),
    ({"data": 3}, "data: 3 is not text"),
    ({"val_batches": 0}, "nothing would be validated"),
]


@pytest.mark.parametrize(("flat", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_kept_is_refused_with_its_reason(
    folder: Path, flat: dict[str, Any], words: str
) -> None:
    (fault,) = faults(folder, flat)
    assert words in fault
    assert fault.startswith("flat.yaml:")


def test_all_that_is_wrong_in_a_flat_file_comes_at_once(folder: Path) -> None:
    found = faults(folder, {"lr": 1, "test": True, "batch_size": 0, "iters": "x"}, "seed=y")
    places = [line.split(": ")[0] for line in found]
    assert places == [
        "flat.yaml:4 lr",
        "flat.yaml:5 test",
        "flat.yaml:6 batch_size",
        "flat.yaml:7 iters",
        "--set seed",
    ]


def test_sets_may_use_flat_keys_and_recipe_keys(folder: Path) -> None:
    schedule = {"name": "cosine_decay", "arguments": [1e-4, 500], "warmup": 90}
    loaded = load(
        folder,
        {"iters": 1000, "lr_schedule": schedule},
        "iters=20",
        "lora_parameters.rank=2",
        "train.save_every=5",
        "data=elsewhere",
        "name=other",
        "lr_schedule.warmup=3",
    )
    train = loaded.recipe.train
    assert (train.iters, train.lora_parameters.rank, train.save_every) == (20, 2, 5)
    assert (loaded.recipe.data.path, loaded.recipe.name) == ("elsewhere", "other")
    assert train.lr_schedule.warmup_steps == 3
    assert loaded.origins["train.iters"] == loaded.origins["data.path"] == "--set"
    assert "iters: 20 mini-batches = 20 optimizer updates" in loaded.notes
    assert same_after_a_round_trip(loaded, folder)


def test_a_set_takes_the_place_of_the_other_default_of_its_pair(folder: Path) -> None:
    loaded = load(folder, {}, "train.epochs=3", "train.lora_parameters.alpha=16")
    assert (loaded.recipe.train.epochs, loaded.recipe.train.iters) == (3, None)
    assert loaded.recipe.train.lora_parameters.effective_scale == 2.0
    assert "both given" in faults(folder, {"iters": 5}, "train.epochs=3")[0]


def test_alpha_is_accepted_where_mlx_lm_has_none(folder: Path) -> None:
    loaded = load(folder, {"lora_parameters": {"rank": 4, "alpha": 8}})
    assert loaded.recipe.train.lora_parameters.effective_scale == 2.0
    assert same_after_a_round_trip(loaded, folder)


def test_every_layer_is_zero_in_mlx_lm_and_minus_one_here(folder: Path) -> None:
    assert load(folder, {"num_layers": 0}).recipe.train.num_layers == -1


@pytest.mark.parametrize(
    ("values", "flat"),
    [
        ({"model": "m", "data": "d", "iters": 1}, True),
        ({"train": True}, True),
        ({"model": "m", "lora_parameters": {}}, True),
        ({"model": "m", "data": {"path": "d"}, "learning_rate": 1}, False),
        ({"model": "m", "train": {"iters": 1}, "seed": 1}, False),
        ({"model": "m", "data": "d"}, False),
        ({}, False),
    ],
)
def test_the_two_forms_are_told_apart(values: dict[str, Any], flat: bool) -> None:
    assert is_mlx_lm_form(values) is flat


def test_translating_changes_nothing_and_needs_no_places() -> None:
    flat = yaml.safe_load(OURS.read_text())
    before = yaml.safe_dump(flat)
    first = from_mlx_lm(flat, {}, "f")
    assert yaml.safe_dump(flat) == before
    assert from_mlx_lm(flat, {}, "f") == first


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats(-1, 1) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "arguments", "warmup", "rank", "alpha", "adam", "x"]), inner
        )
    ),
    max_leaves=5,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(sorted(FLAT_KEYS)) | st.text(max_size=4), VALUES))
def test_any_flat_mapping_is_read_or_refused(folder: Path, flat: dict[str, Any]) -> None:
    try:
        loaded = load(folder, flat)
    except RecipeError:
        return
    assert same_after_a_round_trip(loaded, folder)
