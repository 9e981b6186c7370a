"""Frozen layers that are read when they are needed: the same training, and they are not held."""

from pathlib import Path

import mlx.core as mx
import pytest
from safetensors.numpy import load_file

from mlx_ft.data.tokens import write_split
from mlx_ft.engine.load import load_weights, release
from mlx_ft.recipe.schema import DataRecipe, LoraParameters, Recipe, TrainRecipe
from mlx_ft.train.adapters import save_adapter
from mlx_ft.train.handoff import TrainRequest
from mlx_ft.train.numerics.forward import SplitForward, choose_forward
from mlx_ft.train.numerics.prefix_cache import PrefixCache
from mlx_ft.train.setup import Setup
from tests.support.models import TINY_CONFIGS, write_random_model, write_tiny_model
from tests.support.trainings import Steps, random_rows, train_here
from tests.train.conftest import MakeInputs

ROWS = random_rows(13, seed=1)
LAYERS, TRAINED = 12, 2


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not quantized: on a CPU too, both ways then compute with the same numbers."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), bits=None, layers=4)


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_the_adapter_has_the_same_bits(make_inputs: MakeInputs, tmp_path: Path, cache: str) -> None:
    """With dropout too: reading layers again must not change which masks are drawn."""
    adapters = []
    for low_memory in (False, True):
        inputs = make_inputs(
            ROWS, folder=f"{low_memory}", low_memory=low_memory, prefix_cache=cache, dropout=0.1
        )
        assert isinstance(inputs.forward, SplitForward) and inputs.forward.frozen_layers == 2
        assert (inputs.forward.streamed_from is not None) == low_memory
        train_here(inputs)
        save_adapter(inputs.model, inputs.adapter_config, tmp_path / f"adapter-{low_memory}")
        adapters.append(load_file(tmp_path / f"adapter-{low_memory}" / "adapters.safetensors"))
    held, streamed = adapters
    assert held.keys() == streamed.keys()
    assert all(held[name].tobytes() == streamed[name].tobytes() for name in held)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_cheap_is_computed_twice_without_dropout(
    model_folder: Path, tmp_path: Path, dropout: float
) -> None:
    lora = LoraParameters(dropout=dropout)
    train = TrainRecipe(num_layers=1, low_memory=True, lora_parameters=lora)
    recipe = Recipe(name="tiny", model="tiny", data=DataRecipe(path="."), train=train)
    for name in ("train", "valid"):
        write_split(tmp_path / f"{name}.safetensors", ROWS)
    request = TrainRequest(
        recipe, model_folder, tmp_path, tmp_path, "inputs", "tiny", 1 << 20, tmp_path, ()
    )
    note = Setup(request).inputs(request).forward.note
    assert ("norms and gates computed twice" in note) == (dropout == 0)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers of 4 MB each, and nearly nothing else."""
    config = TINY_CONFIGS["llama"] | {
        "num_hidden_layers": LAYERS,
        "hidden_size": 256,
        "intermediate_size": 1024,
    }
    return write_random_model(tmp_path_factory.mktemp("wide"), config)


def peak_of_start_and_prefix(folder: Path, low_memory: bool) -> int:
    """Return the peak bytes of load, proof and frozen layers, beyond what was there before."""
    release()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _, _ = load_weights(folder, low_memory)
    model.freeze()
    proof = [ROWS.row(0)[0].tolist()]
    forward = choose_forward(model, TRAINED, proof, weights=folder if low_memory else None)
    assert isinstance(forward, SplitForward)
    cache = PrefixCache(forward, ROWS, 1 << 20)
    cache.fill(Steps())
    assert cache.is_complete
    forward.release_frozen()
    return int(mx.get_peak_memory()) - before


def test_frozen_layers_are_never_held_together(wide_folder: Path) -> None:
    size = (wide_folder / "model.safetensors").stat().st_size
    assert peak_of_start_and_prefix(wide_folder, low_memory=False) > size
    # MLX begins to read some ten tensors before they are needed.
    in_flight = 4
    limit = size * (TRAINED + in_flight) // LAYERS
    assert peak_of_start_and_prefix(wide_folder, low_memory=True) < limit
