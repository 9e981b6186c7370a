"""Tiny configs of many architectures, and mlx-lm's models of them."""

import importlib
from typing import Any

import mlx.core as mx
import pytest

CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [3],
    "norm_topk_prob": True,
}
NO_HEAD_DIM = {key: value for key, value in CONFIG.items() if key != "head_dim"}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": CONFIG,
    "mistral": NO_HEAD_DIM,
    "qwen2": NO_HEAD_DIM,
    "qwen3": CONFIG,
    "gemma": CONFIG,
    "gemma2": CONFIG,
    "gemma3_text": CONFIG,
    "smollm3": NO_HEAD_DIM,
    "mixtral": {**NO_HEAD_DIM, **EXPERTS},
    "qwen2_moe": {**NO_HEAD_DIM, **EXPERTS},
    "qwen3_moe": {**CONFIG, **EXPERTS},
}
MLX_LM_MODULES = {"mistral": "llama"}
ALL = pytest.mark.parametrize("model_type", sorted(CONFIGS))


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **CONFIGS[model_type], **changes}


def model_of(config: dict[str, Any]) -> Any:
    name = MLX_LM_MODULES.get(config["model_type"], config["model_type"])
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict(config))
    if config["model_type"] == "gemma3_text":
        model.sanitize({"model.embed_tokens.weight": mx.zeros(1)})  # how it learns of tied weights
    return model
