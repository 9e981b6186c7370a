"""Which architectures can become GGUF, told from config.json alone.

Does: read the numbers that a GGUF states about a model, with mlx-lm's defaults for absent keys.
Give the reason why a model cannot become one.
Does not: look at weights or tokenizers (`export/gguf_tokenizer.py` refuses those), or import MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

# config.json's model_type -> general.architecture of llama.cpp (gguf-py, MODEL_ARCH_NAMES).
ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "llama": "llama",
        "mistral": "llama",
        "qwen2": "qwen2",
        "qwen3": "qwen3",
        "gemma3_text": "gemma3",
    }
)
# What mlx-lm computes with when config.json leaves a key out (ModelArgs in mlx_lm/models/*.py); a
# key that is in neither place is missed.
MLX_LM_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": {"rope_theta": 10000},
        "mistral": {"rope_theta": 10000},
        "qwen2": {"max_position_embeddings": 32768, "rope_theta": 1000000},
        "qwen3": {},
        "gemma3_text": {
            "hidden_size": 1152,
            "num_hidden_layers": 26,
            "intermediate_size": 6912,
            "num_attention_heads": 4,
            "head_dim": 256,
            "rms_norm_eps": 1.0e-6,
            "vocab_size": 262144,
            "num_key_value_heads": 1,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "max_position_embeddings": 32768,
        },
    }
)
NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
    "max_position_embeddings",
    "rope_theta",
)
ROPE_SCALINGS = ("default", "linear", "llama3")
# llama.cpp takes these for every Gemma 3, whatever a file says (src/models/gemma3*.cpp).
GEMMA3_PATTERN = 6
GEMMA3_LOCAL_BASE = 10_000.0
# The 27B is known by its layers and divides by hidden size over heads instead of the head size.
GEMMA3_27B_LAYERS = 62


@dataclass(frozen=True)
class ModelShape:
    """The numbers that a GGUF states about a model.

    architecture: llama.cpp's name for it.
    rope_scaling: config.json's entry, empty when the angles are not scaled.
    sliding_window: in tokens; None where every layer sees the whole context.
    """

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context_tokens: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any]
    sliding_window: int | None


def gguf_fault(config: Mapping[str, Any]) -> str | None:
    """Return why the model of this config.json cannot become a GGUF, or None when it can."""
    try:
        model_shape(config)
    except ValueError as error:
        return str(error)
    return None


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Return a model's numbers for a GGUF, from its config.json, as mlx-lm reads it.

    Raises ValueError with the reason when llama.cpp would compute something else.
    """
    model_type = str(config.get("model_type"))
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"its model_type is {model_type}; the GGUF export knows {known}")
    given = {key: value for key, value in config.items() if value is not None}
    full = {**MLX_LM_DEFAULTS[model_type], **given}
    scaling = full.get("rope_scaling") or {}
    if model_type == "qwen3":
        nested = full.get("rope_parameters") or {}
        full.setdefault("rope_theta", nested.get("rope_theta"))
        scaling = scaling or nested
    if model_type in ("llama", "mistral") and "num_attention_heads" in full:
        full.setdefault("num_key_value_heads", full["num_attention_heads"])
    missing = [key for key in NEEDED if full.get(key) is None]
    if missing:
        raise ValueError(f"its config.json has no {', '.join(missing)}")
    shape = ModelShape(
        architecture=ARCHITECTURES[model_type],
        layers=int(full["num_hidden_layers"]),
        hidden=int(full["hidden_size"]),
        intermediate=int(full["intermediate_size"]),
        heads=int(full["num_attention_heads"]),
        kv_heads=int(full["num_key_value_heads"]),
        head_dim=_head_dim(full, model_type),
        vocabulary=int(full["vocab_size"]),
        context_tokens=int(full["max_position_embeddings"]),
        rms_norm_eps=float(full["rms_norm_eps"]),
        rope_theta=float(full["rope_theta"]),
        rope_scaling={} if _rope_type(scaling) == "default" else dict(scaling),
        sliding_window=int(full["sliding_window"]) if model_type == "gemma3_text" else None,
    )
    reason = _rope_fault(full, scaling, shape)
    if reason is None and model_type == "gemma3_text":
        reason = _gemma_fault(full, shape)
    if reason is not None:
        raise ValueError(reason)
    return shape


def _head_dim(config: Mapping[str, Any], model_type: str) -> int:
    """Return the size of one attention head; mlx-lm's Qwen2 takes no other than an equal share."""
    share = int(config["hidden_size"]) // int(config["num_attention_heads"])
    return share if model_type == "qwen2" else int(config.get("head_dim") or share)


def _rope_type(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("type") or scaling.get("rope_type") or "default")


def _rope_fault(
    config: Mapping[str, Any], scaling: Mapping[str, Any], shape: ModelShape
) -> str | None:
    kind = _rope_type(scaling)
    if kind not in ROPE_SCALINGS:
        known = ", ".join(ROPE_SCALINGS)
        return f"its rope_scaling is {kind}; the GGUF export knows {known}"
    if kind == "llama3" and shape.architecture != "llama":
        return f"its rope_scaling is llama3, which llama.cpp has for {shape.architecture} not"
    if kind != "default" and not isinstance(scaling.get("factor"), int | float):
        return f"its rope_scaling {kind} has no factor"
    if config.get("rope_traditional"):
        return "it has rope_traditional: true, an order of rows that the GGUF export does not know"
    if shape.architecture == "llama" and "sliding_attention" in (config.get("layer_types") or ()):
        return "some of its layers have sliding-window attention, which llama.cpp's llama has not"
    return None


def _gemma_fault(config: Mapping[str, Any], shape: ModelShape) -> str | None:
    """Return the difference from the constants that llama.cpp has for Gemma 3, or None."""
    per_head = shape.head_dim
    if shape.layers == GEMMA3_27B_LAYERS:
        per_head = shape.hidden // shape.heads
    fixed = {
        "sliding_window_pattern": GEMMA3_PATTERN,
        "rope_local_base_freq": GEMMA3_LOCAL_BASE,
        "query_pre_attn_scalar": per_head,
    }
    for key, expected in fixed.items():
        if config[key] != expected:
            return f"its {key} is {config[key]}, llama.cpp computes with {expected:g}"
    return None
