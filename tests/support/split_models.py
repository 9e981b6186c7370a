"""Tiny models with adapters, rows for them, and their losses and gradients."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model

from mlx_ft.data.tokens import TokenizedSplit
from mlx_ft.engine.load import load_weights
from mlx_ft.recipe.schema import DataRecipe, LoraParameters, Recipe, TrainRecipe
from mlx_ft.train.adapters import adapter_config, put_adapter
from mlx_ft.train.numerics.batch import make_batch
from mlx_ft.train.numerics.forward import (
    Forward,
)
from mlx_ft.train.numerics.losses import cross_entropy_sum
from mlx_ft.train.numerics.prefix_cache import PrefixCache
from tests.support import models
from tests.support.models import TINY_CONFIGS, write_tiny_model

LAYERS = 3
WINDOW = 8
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 320,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
MORE_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "model_type": "gemma3_text",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "vocab_size": 320,
        "query_pre_attn_scalar": 16,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "vocab_size": 320,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "rope_theta": 10000,
        "rope_scaling": None,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3_moe": TINY
    | {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "smollm3": TINY | {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "gemma2": TINY_CONFIGS["gemma2"],
    **{name: TINY | {"model_type": name} for name in ("mistral", "qwen2", "phi3", "olmo2")},
}


def rows_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 320, length).tolist() for length in lengths]


def make_other(name: str, folder: Path, **changes: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.TINY_CONFIGS, name, MORE_CONFIGS[name] | changes)
        return write_tiny_model(folder, name, bits=None, layers=LAYERS)


def model_of(kind: str, folder: Path, bits: int | None = None) -> Path:
    """Write a tiny model of a kind that the tests have by themselves, or of one from here (never
    quantized)."""
    if kind in MORE_CONFIGS:
        return make_other(kind, folder)
    return write_tiny_model(folder, kind, bits=bits, layers=LAYERS)


def loaded(folder: Path) -> nn.Module:
    """Return a model as it is when its layers are about to get an adapter: nothing trains."""
    model, _, _ = load_weights(folder)
    model.freeze()
    return model


def adapted(folder: Path, num_layers: int, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """Return a model whose top layers have an adapter that matters, the same one each time; in
    float64 with the numbers that quantized weights stand for.
    """
    model = loaded(folder)
    if dtype == mx.float64:
        model = dequantize_model(model)
        model.freeze()
    lora = LoraParameters(rank=4, alpha=8.0)
    recipe = TrainRecipe(num_layers=num_layers, lora_parameters=lora)
    whole = Recipe(name="tiny", model="tiny", data=DataRecipe(path="."), train=recipe)
    put_adapter(model, recipe, adapter_config(whole, num_layers))
    new = [
        (name, mx.random.normal(array.shape) * 0.2)
        for name, array in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(new, strict=False)
    if dtype == mx.float64:
        model.set_dtype(dtype)
    model.eval()
    return model


def loss_and_gradient(
    model: nn.Module, forward: Forward, rows: TokenizedSplit, shared_tokens: int | None = None
) -> tuple[float, dict[str, np.ndarray]]:
    """Return loss and adapter gradient of one batch, padded unless tokens may be shared, as the
    training computes them."""
    batch = make_batch(rows, tuple(range(len(rows))), shared_tokens)
    prefix = PrefixCache(forward, rows, 1 << 20).batch(batch)
    function = nn.value_and_grad(model, lambda b, p: cross_entropy_sum(forward, b, p))
    loss, gradient = function(batch, prefix)
    return loss.item(), {name: np.array(a) for name, a in tree_flatten(gradient)}


def gradient_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Return the largest difference of two gradients, over the largest value of the other."""
    assert one.keys() == other.keys()
    largest = max(np.abs(array).max() for array in other.values())
    assert largest > 0
    return float(max(np.abs(one[name] - other[name]).max() for name in other) / largest)
