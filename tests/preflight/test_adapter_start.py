"""An adapter file to start from is compared with the recipe's adapter, by its tensors' shapes."""

from typing import Any

import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_ft.model.shapes import model_shape
from mlx_ft.preflight.adapter_start import adapter_shapes
from mlx_ft.preflight.findings import Finding, PreflightInput
from mlx_ft.recipe.schema import LoraParameters, TrainRecipe
from tests.support.preflight_inputs import finding_of, quickstart, with_recipe
from tests.support.shapes import ALL, config_of, model_of

Shapes = dict[str, tuple[int, ...]]


@ALL
@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("lora", None),
        ("lora", ["self_attn.q_proj", "model.embed_tokens"]),
        ("dora", ["self_attn.v_proj", "model.embed_tokens"]),
    ],
)
def test_tensors_are_those_that_mlx_lm_makes(
    model_type: str, kind: Any, keys: list[str] | None
) -> None:
    config = config_of(model_type)
    model = model_of(config)
    model.freeze()
    lora = {"rank": 3, "scale": 1.0, "dropout": 0.0} | ({"keys": keys} if keys else {})
    linear_to_lora_layers(model, 1, lora, use_dora=kind == "dora")
    made = {name: array.shape for name, array in tree_flatten(model.trainable_parameters())}
    parameters = LoraParameters(rank=3, keys=keys)
    train = TrainRecipe(num_layers=1, lora_parameters=parameters, fine_tune_type=kind)
    shape = model_shape(config)
    assert shape is not None and adapter_shapes(shape, train) == made


def found_with(facts: PreflightInput, start: Shapes) -> Finding:
    changed = PreflightInput(**{**vars(facts), "start_shapes": start})
    return finding_of("resume_adapter_file", changed)


def made_by(facts: PreflightInput, **train: Any) -> Shapes:
    shape = model_shape(facts.model_config)
    assert shape is not None
    return adapter_shapes(shape, with_recipe(facts, "train", **train).recipe.train)


def test_what_the_recipe_makes_fits_and_no_file_needs_to() -> None:
    facts = quickstart()
    assert finding_of("resume_adapter_file", facts).level == "ok"
    assert found_with(facts, made_by(facts)).level == "ok"


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"lora_parameters": {"rank": 16}}, "it has rank 16, the recipe says 8"),
        ({"num_layers": 2}, "it has layers 28 to 29, the recipe trains layers 22 to 29"),
        ({"fine_tune_type": "dora"}, "it is a dora adapter, the recipe says lora"),
        ({"lora_parameters": {"keys": ["mlp.up_proj"]}}, "it has no mlp.down_proj, mlp.gate_proj"),
    ],
)
def test_another_adapter_is_refused_in_a_few_words(train: dict[str, Any], said: str) -> None:
    facts = quickstart()
    finding = found_with(facts, made_by(facts, **train))
    assert finding.level == "fail" and said in finding.measured
    assert len(finding.measured) < 300


def test_modules_and_widths_of_another_model_are_named() -> None:
    facts = quickstart()
    more = made_by(facts) | {"model.layers.29.mlp.gate.lora_a": (576, 8)}
    assert "the recipe trains no mlp.gate" in found_with(facts, more).measured
    wide = {name: (*shape[:-1], 2 * shape[-1]) for name, shape in made_by(facts).items()}
    wide |= {name: shape for name, shape in made_by(facts).items() if name.endswith("lora_a")}
    assert "tensors are of another width" in found_with(facts, wide).measured


def test_of_an_unknown_architecture_rank_and_layers_are_compared() -> None:
    known = quickstart()
    facts = quickstart(model_config={"model_type": "mamba", "num_hidden_layers": 30})
    assert found_with(facts, made_by(known)).level == "ok"
    others: tuple[dict[str, Any], ...] = ({"lora_parameters": {"rank": 16}}, {"num_layers": 2})
    for train in others:
        assert found_with(facts, made_by(known, **train)).level == "fail"
    plain: Shapes = {"model.layers.29.mlp.up_proj.weight": (1536, 576)}
    assert "it is no adapter" in found_with(facts, plain).measured
