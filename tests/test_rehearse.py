"""Every shipped recipe goes through every stage, with a random miniature of its kind of model."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_ft.cli.main import cli
from mlx_ft.engine.device import AS_GPU
from mlx_ft.engine.load import load_weights
from mlx_ft.errors import ModelError
from mlx_ft.model.resolve import resolve_model
from mlx_ft.preflight.known_models import KNOWN_MODELS
from mlx_ft.recipe.load import load_recipe
from mlx_ft.rehearse import miniature_config, miniature_sets, write_miniature
from mlx_ft.system.console import Console
from tests.support.gpu import BASE_TYPES, write_gpu_model
from tests.support.models import TINY_CONFIGS, write_random_model, write_tiny_model
from tests.support.paths import ROOT
from tests.support.rows import write_rows
from tests.support.slow import fast_first

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# What a recipe's model is: the part of its name, and the known model of that shape.
SHAPES = {
    "Llama-3.2-3B": "Llama-3.2-3B",
    "Qwen2.5-7B": "Qwen2.5-7B",
    "Qwen3-0.6B": "Qwen3-0.6B",
    "Qwen3-8B": "Qwen3-8B",
    "Qwen3-14B": "Qwen3-14B",
    "Qwen3-Coder-30B-A3B": "Qwen3-30B-A3B",
    "smollm2-135m": "SmolLM2-135M",
}
REST = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 4096}


def write_stand_in(folder: Path, shape: dict[str, Any], bits: int | None) -> Path:
    """Write a random model as deep as a real one and narrow, with a tokenizer of its own."""
    depth = shape["num_hidden_layers"]
    config = miniature_config(shape) | REST | {"vocab_size": 320, "num_hidden_layers": depth}
    return write_random_model(folder, config, bits=bits, group_size=64)


def run_cli(*arguments: str) -> None:
    cli.main([*arguments], standalone_mode=False)


@pytest.mark.recipes
@pytest.mark.parametrize("as_gpu", ["0", "1"], ids=["cpu", "gpu"])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_passes_in_miniature(
    path: Path,
    as_gpu: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Its values are its own; model and rows are stand-ins, since neither is in this tree."""
    if as_gpu == "1" and "a3b" in path.stem:
        pytest.skip("a CPU multiplies experts in float32 only")
    monkeypatch.setenv(AS_GPU, as_gpu)
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path).recipe
    (shape,) = [KNOWN_MODELS[known] for part, known in SHAPES.items() if part in recipe.model]
    bits = next((b for b in (4, 8) if f"{b}bit" in recipe.model), None)
    model = write_stand_in(tmp_path / "model", dict(shape), bits)
    data = write_rows(tmp_path / "data", train=900, valid=12)
    runs = tmp_path / "runs"
    sets = (f"model={model}", f"data.path={data}", "data.limit=900")
    arguments = [part for text in sets for part in ("--set", text)]
    run_cli("rehearse", str(path), *arguments, "--runs", str(runs), "--miniature")
    said = capfd.readouterr()
    assert "every stage went through" in said.out
    assert all(f"{stage} done in" in said.err for stage in ("data", "train", "export", "eval"))
    assert not list(runs.glob("*-rehearsal-*")), "nothing of it is kept"


@pytest.mark.parametrize("base_type", fast_first(BASE_TYPES))
def test_a_shipped_recipe_passes_in_a_gpus_way(
    base_type: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """On a base of each type, with heads of 64 numbers, as fused attention wants them."""
    monkeypatch.setenv(AS_GPU, "1")
    monkeypatch.chdir(ROOT)
    model = write_gpu_model(tmp_path / "model", "llama", base_type)
    data = write_rows(tmp_path / "data", train=900, valid=12)
    runs = tmp_path / "runs"
    sets = (f"model={model}", f"data.path={data}", "data.limit=900", "train.num_layers=2")
    arguments = [part for text in sets for part in ("--set", text)]
    recipe = str(ROOT / "recipes" / "llama-3.2-3b-16gb.yaml")
    run_cli("rehearse", recipe, *arguments, "--runs", str(runs), "--miniature")
    said = capfd.readouterr()
    assert "every stage went through" in said.out
    assert "as stored" in said.err and "WARNING" not in said.err


@pytest.mark.parametrize("name", ["Llama-3.2-3B", "Qwen3-8B", "Qwen3-30B-A3B", "Gemma-3-1B"])
def test_a_miniature_is_of_the_same_kind_and_tiny(name: str) -> None:
    config = dict(KNOWN_MODELS[name])
    small = miniature_config(config)
    assert small["num_hidden_layers"] == 2
    for same in ("model_type", "vocab_size", "tie_word_embeddings"):
        assert small[same] == config[same]
    assert small["num_attention_heads"] % small["num_key_value_heads"] == 0


def test_a_miniature_never_grows() -> None:
    config = {**TINY_CONFIGS["qwen3"], "layer_types": ["a", "b", "c"], "mlp_only_layers": [7]}
    small = miniature_config(config)
    assert (small["hidden_size"], small["layer_types"]) == (64, ["a", "b"])
    assert small["mlp_only_layers"] == []


@pytest.mark.parametrize("bits", [None, 4])
def test_a_miniature_is_a_whole_model_folder(tmp_path: Path, bits: int | None) -> None:
    base = write_tiny_model(tmp_path / "base", "qwen3", bits=bits, layers=5)
    write_miniature(resolve_model(str(base), None, Console()), tmp_path / "small")
    small = resolve_model(str(tmp_path / "small"), None, Console())
    model, config, _ = load_weights(small.path)
    assert len(model.layers) == 2 and ("quantization" in config) == (bits is not None)
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, 320)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (small.path / name).read_bytes() == (base / name).read_bytes()


def test_an_architecture_that_is_not_known_is_a_message(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "nothing_known"}))
    with pytest.raises(ModelError, match="without --miniature"):
        write_miniature(resolve_model(str(base), None, Console()), tmp_path / "small")


@pytest.mark.parametrize(("wanted", "layers", "small"), [(16, 28, 1), (-1, 28, -1), (28, 28, -1)])
def test_frozen_layers_stay_frozen(wanted: int, layers: int, small: int, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\ndata: {path: d}\n")
    recipe = load_recipe(tmp_path / "r.yaml", (f"train.num_layers={wanted}",)).recipe
    assert f"train.num_layers={small}" in miniature_sets(recipe, layers, tmp_path)
