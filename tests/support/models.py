"""Tiny random models: configs, weights, folders."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.tokenizers import write_tiny_tokenizer

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn


TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 320,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    },
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "vocab_size": 320,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
    },
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": 320,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    },
    "mistral": {
        "model_type": "mistral",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
        "vocab_size": 320,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
    },
    "gemma2": {
        "model_type": "gemma2",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "rms_norm_eps": 1e-6,
        "vocab_size": 320,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "hidden_size": 64,
        "num_hidden_layers": 7,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "rms_norm_eps": 1e-6,
        "vocab_size": 320,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 8,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 512,
    },
}


def random_model(config: dict[str, Any], seed: int = 0) -> "nn.Module":
    """Return mlx-lm's model of this config, with the weights that a seed gives it."""
    import mlx.core as mx
    from mlx_lm.utils import _get_classes

    model_class, arguments_class = _get_classes(config)
    mx.random.seed(seed)
    model: nn.Module = model_class(arguments_class.from_dict(config))
    return model


def stored_arrays(file: Path) -> "dict[str, mx.array]":
    """Return the tensors of a safetensors file, as MLX reads them."""
    import mlx.core as mx

    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    return arrays


def write_model_files(folder: Path, config: dict[str, Any], weights: dict[str, "mx.array"]) -> Path:
    """Write config.json and model.safetensors into `folder`; return it."""
    import mlx.core as mx

    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_random_model(
    folder: Path,
    config: dict[str, Any],
    *,
    bits: int | None = None,
    group_size: int = 32,
    seed: int = 0,
) -> Path:
    """Write a random model of this config with the tiny tokenizer, quantized if `bits` is given."""
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    write_tiny_tokenizer(folder)
    model = random_model(config, seed)
    if bits is not None:
        nn.quantize(model, group_size=group_size, bits=bits)
        config = config | {"quantization": {"group_size": group_size, "bits": bits}}
    return write_model_files(folder, config, dict(tree_flatten(model.parameters())))


def write_stored(
    folder: Path, kind: str, dtype: "mx.Dtype", bits: int | None = None, layers: int = 3
) -> Path:
    """Write a tiny random model into a new folder with its weights, or their scales, in this
    type."""
    return write_stored_model(
        folder, TINY_CONFIGS[kind] | {"num_hidden_layers": layers}, dtype, bits
    )


def write_stored_model(
    folder: Path, config: dict[str, Any], dtype: "mx.Dtype", bits: int | None = None
) -> Path:
    """Write a random model of this config into a new folder, its weights, or their scales, in this
    type."""
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    folder.mkdir(parents=True)
    write_tiny_tokenizer(folder)
    model = random_model(config)
    if config["model_type"] == "gemma3_text":
        model.pop("lm_head")  # as its sanitize does for a folder without one
    model.set_dtype(dtype)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
        config = config | {"quantization": {"group_size": 32, "bits": bits}}
    return write_model_files(folder, config, dict(tree_flatten(model.parameters())))


def write_tiny_model(
    folder: Path, model_type: str = "llama", *, bits: int | None = 4, layers: int = 2, seed: int = 0
) -> Path:
    """Write a complete random model folder, quantized in groups of 32 unless `bits` is None."""
    config = TINY_CONFIGS[model_type] | {"num_hidden_layers": layers}
    return write_random_model(folder, config, bits=bits, seed=seed)


def write_random_weights(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Write a float16 model of this config with the tokenizer that `folder` has (or the tiny one).

    Every tensor is random, norms and biases too, and large enough that each one matters.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    if not (folder / "tokenizer.json").exists():
        write_tiny_tokenizer(folder)
    model = random_model(config)
    if config["model_type"] == "gemma3_text":
        model.pop("lm_head")  # as its sanitize does for a folder without one
    mx.random.seed(seed)
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        noise = mx.random.normal(array.shape)
        if name.endswith("norm.weight"):
            centre = 0.0 if config["model_type"] == "gemma3_text" else 1.0
            array = centre + 0.3 * noise
        elif array.ndim == 1:
            array = noise
        elif "embed_tokens" in name:  # a tied head then spreads its guesses over several tokens
            array = 0.25 * noise
        else:
            array = 1.5 * noise / array.shape[-1] ** 0.5
        weights[name] = array.astype(mx.float16)
    return write_model_files(folder, config, weights)
