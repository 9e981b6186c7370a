"""Shapes of popular models, from their config.json files.

Does not: list every model; the config of any other is read from its folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)
# Name -> values of _KEYS.
_DENSE: Mapping[str, tuple[Any, ...]] = {
    "SmolLM2-135M": ("llama", 576, 30, 9, 3, 64, 1536, 49152, True),
    "SmolLM2-360M": ("llama", 960, 32, 15, 5, 64, 2560, 49152, True),
    "Qwen2.5-0.5B": ("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True),
    "Qwen3-0.6B": ("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True),
    "Gemma-3-1B": ("gemma3_text", 1152, 26, 4, 1, 256, 6912, 262144, True),
    "Llama-3.2-1B": ("llama", 2048, 16, 32, 8, 64, 8192, 128256, True),
    "Qwen2.5-1.5B": ("qwen2", 1536, 28, 12, 2, 128, 8960, 151936, True),
    "SmolLM2-1.7B": ("llama", 2048, 24, 32, 32, 64, 8192, 49152, True),
    "Qwen3-1.7B": ("qwen3", 2048, 28, 16, 8, 128, 6144, 151936, True),
    "SmolLM3-3B": ("smollm3", 2048, 36, 16, 4, 128, 11008, 128256, True),
    "Qwen2.5-3B": ("qwen2", 2048, 36, 16, 2, 128, 11008, 151936, True),
    "Llama-3.2-3B": ("llama", 3072, 28, 24, 8, 128, 8192, 128256, True),
    "Qwen3-4B": ("qwen3", 2560, 36, 32, 8, 128, 9728, 151936, True),
    "Mistral-7B-v0.3": ("mistral", 4096, 32, 32, 8, 128, 14336, 32768, False),
    "Qwen2.5-7B": ("qwen2", 3584, 28, 28, 4, 128, 18944, 152064, False),
    "Llama-3.1-8B": ("llama", 4096, 32, 32, 8, 128, 14336, 128256, False),
    "Qwen3-8B": ("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, False),
    "Qwen2.5-14B": ("qwen2", 5120, 48, 40, 8, 128, 13824, 152064, False),
    "Qwen3-14B": ("qwen3", 5120, 40, 40, 8, 128, 17408, 151936, False),
    "Qwen3-32B": ("qwen3", 5120, 64, 64, 8, 128, 25600, 151936, False),
}
_EXPERTS: Mapping[str, Mapping[str, Any]] = {
    "Qwen3-30B-A3B": {
        **dict(zip(_KEYS, ("qwen3_moe", 2048, 48, 32, 4, 128, 6144, 151936, False), strict=True)),
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
}
KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    **{name: dict(zip(_KEYS, values, strict=True)) for name, values in _DENSE.items()},
    **_EXPERTS,
}
