"""An adapter is the one that was trained, whole, in mlx-lm's own format - or it is refused.

What mlx-lm does with the same damaged files is reproduced beside each refusal.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model as mlx_lm_load_model

from mlx_ft.engine.adapters import attach_adapter
from mlx_ft.engine.load import load_weights
from mlx_ft.errors import GateFailed, ModelError, RecipeError
from mlx_ft.recipe.schema import DataRecipe, LoraParameters, Recipe, TrainRecipe
from mlx_ft.train.adapters import (
    ADAPTER_FILE,
    CONFIG_FILE,
    AdapterShape,
    adapter_config,
    load_adapter_weights,
    put_adapter,
    resolve_num_layers,
    save_adapter,
)
from tests.support.models import stored_arrays

IDS = mx.array([[5, 9, 300, 17, 42, 8]])
LAYERS = 3


def recipe_of(seed: int = 0, **lora: Any) -> Recipe:
    parameters = LoraParameters(**({"rank": 4, "alpha": 8.0} | lora))
    train = TrainRecipe(num_layers=2, lora_parameters=parameters, seed=seed)
    return Recipe(name="tiny", model="tiny", data=DataRecipe(path="."), train=train)


def fresh(folder: Path, recipe: Recipe, num_layers: int = 2) -> tuple[nn.Module, AdapterShape]:
    model, _, _ = load_weights(folder)
    shape = put_adapter(model, recipe.train, adapter_config(recipe, num_layers))
    model.eval()
    return model, shape


def logits(model: nn.Module) -> np.ndarray:
    return np.array(model(IDS).astype(mx.float32))


def adapter_of(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.trainable_parameters()))


def shake(model: nn.Module, seed: int = 7) -> None:
    """Give every adapter tensor a value that matters, as training would."""
    mx.random.seed(seed)
    new = {name: mx.random.normal(a.shape) * 0.3 for name, a in adapter_of(model).items()}
    model.load_weights(list(new.items()), strict=False)


@pytest.fixture
def trained(model_folder: Path, tmp_path: Path) -> tuple[nn.Module, Path]:
    """Return a model with an adapter that changes it, and the folder it was saved to."""
    recipe = recipe_of()
    model, _ = fresh(model_folder, recipe)
    shake(model)
    save_adapter(model, adapter_config(recipe, 2), tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_a_fresh_adapter_changes_nothing_and_is_counted(model_folder: Path) -> None:
    """Its second matrix is zero; parameters are rank x (inputs + outputs) of every module."""
    base, _, _ = load_weights(model_folder)
    model, shape = fresh(model_folder, recipe_of())
    assert np.array_equal(logits(model), logits(base))
    adapter = adapter_of(model)
    assert shape.trainable_parameters == sum(a.size for a in adapter.values())
    assert shape.total_parameters == sum(a.size for _, a in tree_flatten(base.parameters()))
    assert {name.split(".")[2] for name in shape.modules} == {"1", "2"}, "the top two of three"
    modules = dict(base.named_modules())
    sizes = [sum(modules[name].weight.shape) for name in shape.modules]
    assert shape.trainable_parameters == 4 * sum(sizes)
    assert len(shape.modules) == 2 * 7


def test_the_seed_alone_decides_where_training_starts(model_folder: Path) -> None:
    def start(seed: int) -> dict[str, bytes]:
        mx.random.normal((seed + 3,))  # whatever was drawn before
        model, _ = fresh(model_folder, recipe_of(seed))
        return {name: np.array(a).tobytes() for name, a in adapter_of(model).items()}

    assert start(0) == start(0)
    assert start(0) != start(1)


def test_mlx_lm_loads_what_was_saved_and_computes_the_same(
    model_folder: Path, trained: tuple[nn.Module, Path]
) -> None:
    model, folder = trained
    base, _, _ = load_weights(model_folder)
    assert not np.allclose(logits(base), logits(model), atol=1e-2), "the adapter does nothing"
    same_base = load_adapters(base, str(folder))
    same_base.eval()
    assert np.array_equal(logits(same_base), logits(model))
    quantized, _ = mlx_lm_load_model(model_folder)  # as mlx-lm holds it by itself
    theirs = load_adapters(quantized, str(folder))
    theirs.eval()
    assert np.allclose(logits(theirs), logits(model), atol=1e-3)


def test_what_was_saved_loads_again_bit_for_bit(
    model_folder: Path, trained: tuple[nn.Module, Path]
) -> None:
    """Into layers made for training, and onto a bare model for evaluation."""
    model, folder = trained
    again, _ = fresh(model_folder, recipe_of(seed=3))
    load_adapter_weights(again, folder / ADAPTER_FILE)
    assert np.array_equal(logits(again), logits(model))
    bare, _, _ = load_weights(model_folder)
    config = attach_adapter(bare, folder)
    assert config == adapter_config(recipe_of(), 2)
    assert np.array_equal(logits(bare), logits(model))


def change_adapter(folder: Path, change: Callable[[dict[str, mx.array]], None]) -> Path:
    path = folder / ADAPTER_FILE
    weights = stored_arrays(path)
    mx.eval(weights)
    change(weights)
    path.unlink()
    mx.save_safetensors(str(path), weights)
    return path


def refusals(model_folder: Path, folder: Path) -> list[ModelError]:
    """Return the errors of both ways in; each must refuse."""
    caught = []
    model, _ = fresh(model_folder, recipe_of())
    before = logits(model)
    with pytest.raises(ModelError) as error:
        load_adapter_weights(model, folder / ADAPTER_FILE)
    assert np.array_equal(logits(model), before), "a refused adapter was loaded in part"
    caught.append(error.value)
    bare, _, _ = load_weights(model_folder)
    with pytest.raises(ModelError) as error:
        attach_adapter(bare, folder)
    caught.append(error.value)
    return caught


def test_a_missing_tensor_is_refused_where_mlx_lm_drops_the_layer(
    model_folder: Path, trained: tuple[nn.Module, Path]
) -> None:
    model, folder = trained
    name = next(name for name in adapter_of(model) if name.endswith("lora_b"))
    change_adapter(folder, lambda weights: weights.__delitem__(name))

    base, _, _ = load_weights(model_folder)
    theirs = load_adapters(base, str(folder))  # no complaint
    theirs.eval()
    left_out = dict(tree_flatten(theirs.parameters()))[name]
    assert not left_out.any(), "that layer's adapter does nothing"
    assert not np.allclose(logits(theirs), logits(model), atol=1e-4)

    for error in refusals(model_folder, folder):
        assert [fault.found for fault in error.faults] == ["missing from the adapter"]
        assert name in error.faults[0].where


def test_another_rank_is_refused_where_mlx_lm_resumes_from_it(
    model_folder: Path, tmp_path: Path, trained: tuple[nn.Module, Path]
) -> None:
    _, folder = trained
    other, _ = fresh(model_folder, recipe_of(rank=8))
    save_adapter(other, adapter_config(recipe_of(), 2), tmp_path / "other")

    resumed, _ = fresh(model_folder, recipe_of())
    resumed.load_weights(str(tmp_path / "other" / ADAPTER_FILE), strict=False)  # as mlx_lm.lora
    assert {a.shape[-1] for n, a in adapter_of(resumed).items() if n.endswith("lora_a")} == {8}

    count = len(mx.load(str(folder / ADAPTER_FILE)))
    for error in refusals(model_folder, tmp_path / "other"):
        (fault,) = error.faults
        assert "the model needs" in fault.found and f"and {count - 1} more" in fault.found


def test_unknown_tensors_and_all_other_faults_come_at_once(
    model_folder: Path, trained: tuple[nn.Module, Path]
) -> None:
    model, folder = trained
    first, second, *_ = adapter_of(model)

    def damage(weights: dict[str, mx.array]) -> None:
        weights["model.layers.9.self_attn.q_proj.lora_a"] = weights.pop(first)
        weights[second] = weights[second][:-1]

    change_adapter(folder, damage)
    for error in refusals(model_folder, folder):
        found = [fault.found.split()[0] for fault in error.faults]
        assert found == ["missing", "not", "shape"]


def test_only_safetensors_are_read_whatever_the_name_says(
    model_folder: Path, tmp_path: Path, trained: tuple[nn.Module, Path]
) -> None:
    """MLX's readers of numpy and GGUF files are not made for files of strangers."""
    model, folder = trained
    arrays: dict[str, Any] = {name: np.array(a) for name, a in adapter_of(model).items()}
    np.savez(tmp_path / "adapters.npz", **arrays)
    assert set(mx.load(str(tmp_path / "adapters.npz"))) == set(arrays), "MLX itself would read it"
    np.save(tmp_path / "one.npy", arrays[next(iter(arrays))])
    (tmp_path / "torn.safetensors").write_bytes((folder / ADAPTER_FILE).read_bytes()[:-10])
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("adapters.npz", "one.npy", "torn.safetensors", "empty.safetensors"):
        with pytest.raises(ModelError, match="not readable"):
            load_adapter_weights(model, tmp_path / name)
    for name in ("folder.safetensors", "nothing.safetensors"):
        with pytest.raises(ModelError, match="not readable"):
            load_adapter_weights(model, tmp_path / name)
    shutil.copy(folder / ADAPTER_FILE, tmp_path / "right.npz")
    load_adapter_weights(model, tmp_path / "right.npz")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_never_written(
    trained: tuple[nn.Module, Path], tmp_path: Path, value: float
) -> None:
    model, folder = trained
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    name, array = next(iter(adapter_of(model).items()))
    array[0, 0] = value
    model.load_weights([(name, array)], strict=False)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(GateFailed, match="not finite") as caught:
            save_adapter(model, {}, target)
        assert caught.value.exit_code == 1 and name in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_keys_that_match_nothing_name_what_there_is(model_folder: Path) -> None:
    """mlx-lm finds nothing to train, and says "[grad] Must specify at least one argument"."""
    model, _, _ = load_weights(model_folder)
    model.freeze()
    config = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_porj"]}
    linear_to_lora_layers(model, 2, config)
    with pytest.raises(ValueError, match=r"\[grad\]"):
        nn.value_and_grad(model, lambda ids: model(ids).sum())(IDS)

    with pytest.raises(RecipeError) as caught:
        fresh(model_folder, recipe_of(keys=["self_attn.q_porj", "mlp.up_proj", "mlp.experts"]))
    wrong, unknown = caught.value.faults
    assert "did you mean self_attn.q_proj?" in wrong.fix
    assert unknown.found.startswith("mlp.experts ")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert name in unknown.fix


def test_keys_adapt_the_named_modules_only(model_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(keys=["self_attn.q_proj", "self_attn.v_proj"])
    model, shape = fresh(model_folder, recipe)
    assert {name.split(".", 3)[3] for name in shape.modules} == {
        "self_attn.q_proj",
        "self_attn.v_proj",
    }
    save_adapter(model, adapter_config(recipe, 2), tmp_path)
    bare, _, _ = load_weights(model_folder)
    attach_adapter(bare, tmp_path)


class _Block(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(4, 4))
        self.experts = SwitchLinear(4, 4, 2)


class _Hybrid(nn.Module):
    """As in hybrid models: the layers do not all have the same modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [_Block("attention"), _Block("mixer")]


def test_keys_of_lower_layers_only_are_refused() -> None:
    recipe = recipe_of(keys=["attention"])
    with pytest.raises(RecipeError, match="none of them is in the top 1 layers"):
        put_adapter(_Hybrid(), recipe.train, adapter_config(recipe, 1))
    shape = put_adapter(_Hybrid(), recipe.train, adapter_config(recipe, 2))
    assert shape.modules == ("layers.0.attention",)


def test_the_experts_of_a_mixture_can_be_named() -> None:
    recipe = recipe_of(keys=["experts"])
    shape = put_adapter(_Hybrid(), recipe.train, adapter_config(recipe, 2))
    assert shape.modules == ("layers.0.experts", "layers.1.experts")


@pytest.mark.parametrize(("asked", "got"), [(-1, LAYERS), (1, 1), (LAYERS, LAYERS)])
def test_num_layers_counts_from_the_top(asked: int, got: int) -> None:
    assert resolve_num_layers(asked, LAYERS) == got


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(RecipeError, match="4, but the model has 3 layers") as caught:
        resolve_num_layers(LAYERS + 1, LAYERS)
    assert caught.value.exit_code == 2 and "-1 for all" in caught.value.faults[0].fix


@pytest.mark.parametrize(
    ("lora", "scale"),
    [({"alpha": 8.0, "rank": 4}, 2.0), ({"scale": 20.0, "alpha": None}, 20.0)],
)
def test_the_config_says_what_mlx_lm_needs_and_no_more(
    model_folder: Path, tmp_path: Path, lora: dict[str, Any], scale: float
) -> None:
    """The strength is written as mlx-lm's scale, however it was asked for."""
    recipe = recipe_of(**lora)
    model, _ = fresh(model_folder, recipe)
    save_adapter(model, adapter_config(recipe, 2), tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text()) == {
        "fine_tune_type": "lora",
        "model": "tiny",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": scale, "dropout": 0.0},
    }
    assert {path.name for path in tmp_path.iterdir()} == {ADAPTER_FILE, CONFIG_FILE}
