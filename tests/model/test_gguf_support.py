"""A model that llama.cpp would compute otherwise is refused from its config.json alone."""

import dataclasses

import pytest
from mlx_lm.utils import _get_classes

from mlx_ft.model.gguf_support import ARCHITECTURES, MLX_LM_DEFAULTS, gguf_fault, model_shape
from tests.support.models import TINY_CONFIGS

LLAMA, GEMMA = TINY_CONFIGS["llama"], TINY_CONFIGS["gemma3_text"]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_known_kind_is_let_through(model_type: str) -> None:
    assert gguf_fault(TINY_CONFIGS[model_type]) is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "granite"}, "model_type is granite"),
        ({}, "model_type is None"),
        ({k: v for k, v in LLAMA.items() if k != "max_position_embeddings"}, "max_position"),
        (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        (LLAMA | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "no factor"),
        (LLAMA | {"rope_traditional": True}, "rope_traditional"),
        (LLAMA | {"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        (TINY_CONFIGS["qwen2"] | {"rope_scaling": LLAMA3}, "llama3"),
        (GEMMA | {"sliding_window_pattern": 4}, "sliding_window_pattern is 4"),
        (GEMMA | {"rope_local_base_freq": 5000.0}, "rope_local_base_freq"),
        (GEMMA | {"query_pre_attn_scalar": 168}, "query_pre_attn_scalar is 168"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    config: dict[str, object], reason: str
) -> None:
    assert reason in str(gguf_fault(config))


def test_the_scale_of_the_largest_gemma() -> None:
    config = GEMMA | {"num_hidden_layers": 62, "hidden_size": 5376, "num_attention_heads": 32}
    assert gguf_fault(config | {"query_pre_attn_scalar": 168}) is None
    assert gguf_fault(config | {"query_pre_attn_scalar": 32}) is not None


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_defaults_are_those_of_mlx_lm(model_type: str) -> None:
    _, arguments = _get_classes({"model_type": model_type})
    theirs = {
        field.name: field.default
        for field in dataclasses.fields(arguments)
        if field.default not in (dataclasses.MISSING, None)
    }
    ours = dict(MLX_LM_DEFAULTS[model_type])
    assert {key: theirs[key] for key in ours} == ours
    needed = {"hidden_size", "num_hidden_layers", "rope_theta", "max_position_embeddings"}
    assert needed & theirs.keys() <= ours.keys()


def test_numbers_are_read_as_mlx_lm_reads_them() -> None:
    shape = model_shape({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"})
    assert (shape.kv_heads, shape.head_dim, shape.rope_scaling) == (4, 16, {})
    assert model_shape(LLAMA | {"head_dim": 32}).head_dim == 32
    assert model_shape(TINY_CONFIGS["qwen2"] | {"head_dim": 32}).head_dim == 16
    assert model_shape(LLAMA | {"rope_scaling": LLAMA3}).rope_scaling == LLAMA3
    nested = {k: v for k, v in TINY_CONFIGS["qwen3"].items() if k != "rope_theta"}
    nested["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6}
    assert model_shape(nested).rope_theta == 5e6
    assert model_shape(GEMMA).sliding_window == 8
    assert model_shape(LLAMA | {"sliding_window": 8}).sliding_window is None
