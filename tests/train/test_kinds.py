"""Every kind of training leaves what mlx-lm loads, and the same model whichever way it is put
together: trained, loaded by mlx-lm, loaded by us, fused.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from mlx_ft.engine.adapters import attach_adapter
from mlx_ft.engine.load import load_weights
from mlx_ft.errors import GateFailed, ModelError, RecipeError
from mlx_ft.export.fuse import FusedModel, fuse
from mlx_ft.recipe.schema import DataRecipe, LoraParameters, Recipe, TrainRecipe
from mlx_ft.train.adapters import adapter_config, put_adapter, save_adapter
from mlx_ft.train.numerics.batch import make_batch
from mlx_ft.train.numerics.forward import SplitForward, choose_forward
from mlx_ft.train.numerics.losses import cross_entropy_sum
from mlx_ft.train.numerics.prefix_cache import PrefixCache
from tests.support.models import stored_arrays, write_tiny_model
from tests.support.trainings import random_rows

ROWS = random_rows(6, seed=3)
PROMPT = mx.array([[5, 6, 7, 8, 9, 10, 11]])
LAYERS = 2


def recipe_of(kind: str, **changes: Any) -> Recipe:
    values = {"fine_tune_type": kind, "num_layers": LAYERS}
    lora = LoraParameters(rank=4, alpha=8.0)
    train = TrainRecipe.model_validate({**values, "lora_parameters": lora, **changes})
    return Recipe(name="tiny", model="tiny", data=DataRecipe(path="."), train=train)


def gradient_of(model: nn.Module, forward: SplitForward) -> tuple[float, dict[str, mx.array]]:
    cache = PrefixCache(forward, ROWS, 1 << 20)
    batch = make_batch(ROWS, (0, 2, 3, 5))
    loss, gradient = nn.value_and_grad(
        model, lambda: cross_entropy_sum(forward, batch, cache.batch(batch))
    )()
    return float(loss), dict(tree_flatten(gradient))


def whole(fused: FusedModel) -> nn.Module:
    """Return a fused model in memory."""
    fused.load("")
    return fused.plain


def trained(folder: Path, kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model that has taken two steps, and its adapter's config."""
    model, _, _ = load_weights(folder)
    recipe = recipe_of(kind)
    config = adapter_config(recipe, LAYERS)
    put_adapter(model, recipe.train, config)
    model.eval()
    forward = choose_forward(model, LAYERS, [ROWS.row(0)[0].tolist()])
    assert isinstance(forward, SplitForward) and forward.frozen_layers == 1
    for _ in range(2):
        _, gradient = gradient_of(model, forward)
        now = dict(tree_flatten(model.trainable_parameters()))
        model.load_weights([(n, now[n] - 0.02 * gradient[n]) for n in now], strict=False)
    return model, config


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def plain_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"plain-{request.param}")
    return write_tiny_model(folder, request.param, layers=3, bits=None)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_same_model_whichever_way_it_is_put_together(
    plain_folder: Path, tmp_path: Path, kind: str
) -> None:
    model, config = trained(plain_folder, kind)
    base, _, _ = load_weights(plain_folder)
    logits = model(PROMPT)
    assert float(mx.abs(logits - base(PROMPT)).max()) > 1e-3, "two steps must have moved it"
    save_adapter(model, config, tmp_path)
    theirs, _, _ = load_weights(plain_folder)
    load_adapters(theirs, str(tmp_path))
    ours, _, _ = load_weights(plain_folder)
    attach_adapter(ours, tmp_path)
    for other in (theirs, ours):
        other.eval()
        assert mx.array_equal(other(PROMPT), logits).item()
    fused = fuse(plain_folder, tmp_path, "float16")
    largest = float(mx.abs(logits).max())
    difference = float(mx.abs(whole(fused)(PROMPT) - logits).max())
    assert difference < 0.02 * largest, "float16 rounds each weight by up to 0.05 %"
    assert not any("lora" in name for name in fused.weights)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_quantized_bases_fuse_to_what_they_were(
    tmp_path: Path, kind: str, bits: int
) -> None:
    folder = write_tiny_model(tmp_path / "base", "llama", layers=3, bits=bits)
    model, config = trained(folder, kind)
    save_adapter(model, config, tmp_path / "adapter")
    fused = whole(fuse(folder, tmp_path / "adapter", "float16"))
    logits = model(PROMPT)
    assert float(mx.abs(fused(PROMPT) - logits).max()) < 0.02 * float(mx.abs(logits).max())


def test_full_trains_every_weight_of_the_top_layers_and_no_other(plain_folder: Path) -> None:
    model, _, _ = load_weights(plain_folder)
    recipe = recipe_of("full")
    shape = put_adapter(model, recipe.train, adapter_config(recipe, LAYERS))
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    tops = ("model.layers.1.", "model.layers.2.")
    top = {n for n, _ in tree_flatten(model.parameters()) if n.startswith(tops)}
    assert names == top
    assert shape.trainable_parameters == sum(
        a.size for n, a in tree_flatten(model.parameters()) if n in top
    )


def test_an_adapter_that_lacks_a_tensor_is_not_fused(plain_folder: Path, tmp_path: Path) -> None:
    model, config = trained(plain_folder, "dora")
    save_adapter(model, config, tmp_path)
    file = tmp_path / "adapters.safetensors"
    weights = stored_arrays(file)
    del weights["model.layers.2.mlp.down_proj.m"]
    mx.save_safetensors(str(file), weights)
    with pytest.raises((ModelError, GateFailed), match=r"layers\.2\.mlp\.down_proj\.m"):
        fuse(plain_folder, tmp_path, "float16")


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_computing_activations_twice_changes_no_gradient(plain_folder: Path, kind: str) -> None:
    results = []
    for twice in (False, True):
        model, _, _ = load_weights(plain_folder)
        recipe = recipe_of(kind)
        put_adapter(model, recipe.train, adapter_config(recipe, LAYERS))
        model.eval()
        forward = choose_forward(model, LAYERS, [ROWS.row(0)[0].tolist()], twice)
        assert isinstance(forward, SplitForward), forward.note
        assert ("twice" in forward.note) == twice
        results.append(gradient_of(model, forward))
    (loss, plain), (other_loss, checkpointed) = results
    assert other_loss == pytest.approx(loss, rel=1e-6)
    largest = max(float(mx.abs(array).max()) for array in plain.values())
    assert plain.keys() == checkpointed.keys() and largest > 0
    for name, array in plain.items():
        assert float(mx.abs(checkpointed[name] - array).max()) <= 1e-6 * largest, name


def test_dora_on_experts_is_the_users_fault() -> None:
    """mlx-lm has no such layer; the message says what to use instead."""
    from mlx_lm.models.switch_layers import SwitchLinear

    from mlx_ft.train.adapters import make_trainable

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = SwitchLinear(8, 8, 2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [Layer()]

    config = adapter_config(recipe_of("dora"), 1)
    with pytest.raises(RecipeError, match="use fine_tune_type: lora"):
        make_trainable(Model(), config)


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    assert LoraParameters(rank=16, alpha=8.0).effective_scale == 0.5
    assert LoraParameters(rank=16, alpha=8.0, rslora=True).effective_scale == 2.0
    assert np.isclose(LoraParameters(rank=8, alpha=8.0, rslora=True).effective_scale, 8**0.5)
    with pytest.raises(ValueError, match="no alpha"):
        LoraParameters(rank=16, scale=8.0, rslora=True)
