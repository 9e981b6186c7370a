"""Faults of the pinned mlx-lm's settings, each reproduced there and shown absent here.

When a new mlx-lm mends one of them, its half of the test fails: then the fault is history, and the
half can go.
"""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import yaml
from mlx.utils import tree_flatten, tree_map
from mlx_lm import lora
from mlx_lm.tuner import trainer
from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches
from mlx_lm.tuner.utils import linear_to_lora_layers
from pydantic import ValidationError

from mlx_ft.engine.load import load_weights
from mlx_ft.errors import Interrupted, RecipeError
from mlx_ft.recipe.load import load_recipe
from mlx_ft.recipe.schema import LoraParameters, TrainRecipe
from mlx_ft.train.adapters import put_adapter
from mlx_ft.train.batches import plan_epoch
from mlx_ft.train.metrics import Metric
from mlx_ft.train.numerics.recompute import checkpointed
from tests.support.models import write_tiny_model
from tests.support.split_models import gradient_difference
from tests.support.trainings import train_here
from tests.train.conftest import MakeInputs

FLAT = {"model": "m", "data": "d", "train": True}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), layers=3)


@pytest.fixture
def model(model_folder: Path) -> nn.Module:
    loaded, _, _ = load_weights(model_folder)
    loaded.freeze()
    return loaded


def their_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **values: Any
) -> SimpleNamespace:
    """Return what mlx_lm.lora makes of a YAML file."""
    file = tmp_path / "flat.yaml"
    file.write_text(yaml.safe_dump(FLAT | values))
    read: list[SimpleNamespace] = []
    monkeypatch.setattr(lora, "run", read.append)
    monkeypatch.setattr("sys.argv", ["mlx_lm.lora", "--config", str(file)])
    lora.main()
    return read[0]


def our_faults(tmp_path: Path, **values: Any) -> str:
    file = tmp_path / "flat.yaml"
    file.write_text(yaml.safe_dump(FLAT | values))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    return str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "value", "right"),
    [
        ("learning-rate", 1e-3, "learning_rate"),
        ("batchsize", 32, "batch_size"),
        ("steps_per_evaluation", 7, "steps_per_eval"),
    ],
)
def test_a_misspelt_key_is_ignored_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, value: float, right: str
) -> None:
    theirs = their_settings(tmp_path, monkeypatch, **{wrong: value})
    assert getattr(theirs, right) == lora.CONFIG_DEFAULTS[right]
    faults = our_faults(tmp_path, **{wrong: value})
    assert wrong in faults and f"did you mean {right}" in faults


def test_a_key_of_the_file_loses_against_a_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = their_settings(tmp_path, monkeypatch, clear_cache_threshold=12345)
    assert theirs.clear_cache_threshold == 0
    file = tmp_path / "flat.yaml"
    notes = load_recipe(file).notes
    assert any("clear_cache_threshold" in note for note in notes), "ours: said, not hidden"


def test_alpha_is_not_understood_and_half_a_section_breaks(model: nn.Module) -> None:
    with pytest.raises(KeyError, match="scale"):
        linear_to_lora_layers(model, 1, {"rank": 8, "alpha": 16.0, "dropout": 0.0})
    with pytest.raises(KeyError, match="dropout"):
        linear_to_lora_layers(model, 1, {"rank": 8, "scale": 2.0})
    assert LoraParameters(rank=8, alpha=16.0).effective_scale == 2.0
    assert LoraParameters(rank=8, scale=2.0).dropout == 0.0


def test_alpha_beside_scale_is_ignored(tmp_path: Path, model: nn.Module) -> None:
    both = {"rank": 8, "alpha": 16.0, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(model, 1, both)
    assert model.layers[-1].self_attn.q_proj.scale == 20.0
    assert "alpha" in our_faults(tmp_path, lora_parameters=both)


def test_keys_that_name_nothing_end_in_the_middle_of_the_first_step(model: nn.Module) -> None:
    keys = ["self_attn.query"]
    linear_to_lora_layers(model, 1, {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": keys})
    with pytest.raises(ValueError, match="at least one argument"):
        nn.value_and_grad(model, lambda ids: model(ids).sum())(mx.array([[3, 4]]))
    recipe = TrainRecipe(num_layers=1, lora_parameters=LoraParameters(keys=keys))
    config = {"num_layers": 1, "lora_parameters": {"keys": keys}}
    with pytest.raises(RecipeError, match=r"self_attn\.q_proj"):
        put_adapter(model, recipe, config)


def test_no_layers_are_all_layers(tmp_path: Path, model: nn.Module) -> None:
    linear_to_lora_layers(model, 0, {"rank": 8, "scale": 2.0, "dropout": 0.0})
    assert all("lora_a" in layer.self_attn.q_proj for layer in model.layers)
    with pytest.raises(ValidationError, match="nothing would be trained"):
        TrainRecipe(num_layers=0)
    (tmp_path / "flat.yaml").write_text(yaml.safe_dump(FLAT | {"num_layers": 0}))
    loaded = load_recipe(tmp_path / "flat.yaml")
    assert loaded.recipe.train.num_layers == -1, "theirs is kept for their files"
    assert "num_layers: 0 is every layer in mlx-lm, read as -1" in loaded.notes


def test_a_batch_larger_than_the_data_ends_the_run() -> None:
    rows = [([5, 6, 7], 1)] * 3
    with pytest.raises(ValueError, match="at least batch_size=4"):
        next(iterate_batches(rows, 4, 32))
    assert [sorted(batch.tolist()) for batch in plan_epoch(3, 4, 0, 0)] == [[0, 1, 2]]


def test_a_callback_is_replaced(monkeypatch: pytest.MonkeyPatch, make_inputs: MakeInputs) -> None:
    handed: list[object] = []
    monkeypatch.setattr(lora, "load", lambda *a, **k: (None, None))
    monkeypatch.setattr(lora, "load_dataset", lambda *a, **k: ([], [], []))
    monkeypatch.setattr(lora, "train_model", lambda *a, **k: handed.append(a[-1]))
    values = lora.CONFIG_DEFAULTS | {"train": True}
    mine = trainer.TrainingCallback()
    lora.run(SimpleNamespace(**values), training_callback=mine)
    assert handed[0] is not mine
    metrics: list[Metric] = []
    train_here(make_inputs(iterations=3), metrics)
    assert [metric["iteration"] for metric in metrics if metric["kind"] == "train"] == [3]


def test_the_settings_are_written_before_the_weights_that_belong_to_them(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_inputs: MakeInputs
) -> None:
    """So after a crash the old weights are loaded with the new scale, without a word."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "adapters.safetensors").write_bytes(b"weights of yesterday, made for scale 20")
    values = lora.CONFIG_DEFAULTS | {"adapter_path": str(folder), "num_layers": 1}
    values["lora_parameters"] = {"rank": 8, "dropout": 0.0, "scale": 1.0}

    def dies(*arguments: object, **named: object) -> None:
        raise MemoryError

    monkeypatch.setattr(lora, "train", dies)
    with pytest.raises(MemoryError):
        lora.train_model(SimpleNamespace(**values), model, [], [])
    assert json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"] == 1
    assert (folder / "adapters.safetensors").read_bytes().startswith(b"weights of yesterday")

    inputs = make_inputs(iterations=8)
    with pytest.raises(Interrupted):
        train_here(inputs, stop_after=4)
    places = {path.parent for path in inputs.folder.rglob("adapter_config.json")}
    assert places and all((place / "adapters.safetensors").exists() for place in places)
    assert all((place / "manifest.json").exists() for place in places)


def test_checkpointing_changes_a_class_for_the_whole_process(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(model.layers[0])
    original = kind.__call__
    checkpointed(model.layers[0], nullcontext)
    assert kind.__call__ is original
    monkeypatch.setattr(kind, "__call__", original)  # puts it back at the end
    trainer.grad_checkpoint(model.layers[0])
    assert kind.__call__ is not original


def gradient_with_dropout(model: nn.Module) -> dict[str, np.ndarray]:
    """Return the gradient of the adapter, for the masks of one seed."""
    ids = mx.array([list(range(3, 23))])
    direction = mx.random.normal((1, 20, 320), key=mx.random.key(1))
    model.train()
    mx.random.seed(2)
    _, gradient = nn.value_and_grad(model, lambda: (model(ids) * direction).mean())()
    return {name: np.array(array) for name, array in tree_flatten(gradient)}


def test_dropout_and_checkpointing_together_give_the_gradient_of_other_masks(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that are computed twice draw again the second time. Ours draw the same masks."""
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.5})
    model.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.2, model.trainable_parameters()))
    right = gradient_with_dropout(model)
    layers = list(model.layers)
    model.model.layers = [checkpointed(layer, lambda _: nullcontext()) for layer in layers]
    assert gradient_difference(gradient_with_dropout(model), right) <= 1e-4
    model.model.layers = layers
    kind = type(layers[0])
    monkeypatch.setattr(kind, "__call__", kind.__call__)  # puts it back at the end
    trainer.grad_checkpoint(layers[0])
    assert gradient_difference(gradient_with_dropout(model), right) > 0.1


def test_a_save_that_fails_ends_the_run_without_a_word_of_what_to_do(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours is a message; tests/train/test_disk.py fills a real disk."""
    linear_to_lora_layers(model, 1, {"rank": 4, "scale": 2.0, "dropout": 0.0})

    def full(*arguments: object, **named: object) -> None:
        raise RuntimeError("[write] Unable to write 8 bytes to file")

    monkeypatch.setattr(trainer.mx, "save_safetensors", full)
    rows = [(np.arange(3, 12).tolist(), 2)] * 4
    arguments = TrainingArgs(
        batch_size=4, iters=2, steps_per_save=1, adapter_file=str(tmp_path / "a.safetensors")
    )
    with pytest.raises(RuntimeError, match="Unable to write"):
        trainer.train(model, lora.optim.Adam(learning_rate=1e-3), rows, rows, arguments)
