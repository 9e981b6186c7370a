"""The shapes read from a config are those of the model that mlx-lm builds from it."""

import math
from typing import Any

import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_ft.model.shapes import DENSE_TYPES, EXPERT_TYPES, model_shape
from mlx_ft.preflight.forecast import adapted_modules, trainable_parameters
from mlx_ft.recipe.schema import LoraParameters, TrainRecipe
from tests.support.shapes import ALL, CONFIGS, config_of, model_of


def matrices(model: Any) -> dict[str, int]:
    """Sizes of all weights with two or three dimensions, by name."""
    parameters = dict(tree_flatten(model.parameters()))
    return {name: array.size for name, array in parameters.items() if array.ndim > 1}


def test_every_known_architecture_is_compared() -> None:
    assert set(CONFIGS) == DENSE_TYPES | EXPERT_TYPES


@ALL
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_sizes_are_those_of_the_model(model_type: str, tied: bool) -> None:
    config = config_of(model_type, tie_word_embeddings=tied)
    shape = model_shape(config)
    assert shape is not None
    expected = {
        f"model.layers.{index}.{module.name}.weight": module.parameters
        for index, layer in enumerate(shape.layers)
        for module in layer
    } | {f"{module.name}.weight": module.parameters for module in shape.roots}
    assert matrices(model_of(config)) == expected
    assert shape.parameters == sum(expected.values())


@ALL
@pytest.mark.parametrize(
    ("num_layers", "keys"),
    [
        (2, None),
        (-1, None),
        (9, None),
        (2, ["self_attn.q_proj", "self_attn.v_proj"]),
        (1, ["self_attn.o_proj", "model.embed_tokens"]),
    ],
)
def test_trainable_parameters_are_those_of_the_adapter(
    model_type: str, num_layers: int, keys: list[str] | None
) -> None:
    config = config_of(model_type)
    train = TrainRecipe(num_layers=num_layers, lora_parameters=LoraParameters(rank=3, keys=keys))
    model = model_of(config)
    model.freeze()
    lora = {"rank": 3, "scale": 1.0, "dropout": 0.0} | ({"keys": keys} if keys else {})
    count = len(model.layers) if num_layers < 0 else num_layers
    linear_to_lora_layers(model, count, lora)
    adapter = dict(tree_flatten(model.trainable_parameters()))
    assert adapter
    shape = model_shape(config)
    assert shape is not None
    assert trainable_parameters(shape, train) == sum(array.size for array in adapter.values())
    assert len(adapted_modules(shape, train)) == len(adapter) / 2


def test_the_embedded_model_is_counted_to_within_one_per_cent() -> None:
    shape = model_shape(
        {
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49_152,
            "tie_word_embeddings": True,
        }
    )
    assert shape is not None
    assert math.isclose(shape.parameters, 134_515_008, rel_tol=0.01)  # its model card: 135M


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mamba"},
        {"model_type": None},
        {"hidden_size": None},
        {"hidden_size": "4096"},
        {"num_hidden_layers": True},
        {"num_attention_heads": 0},
        {"intermediate_size": [48]},
        {"vocab_size": -1},
    ],
    ids=str,
)
def test_what_is_not_known_is_not_guessed(change: dict[str, Any]) -> None:
    assert model_shape(config_of("llama") | change) is None


def test_a_head_width_that_cannot_be_derived_is_not_derived() -> None:
    config = config_of("qwen3")
    del config["head_dim"]
    assert model_shape(config) is None
