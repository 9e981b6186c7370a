"""Linear layers of an architecture, from config.json alone.

Does: list every module that can carry a LoRA adapter, with its shape. Count parameters.
Does not: load weights, import MLX, or guess at an architecture that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Blocks of self_attn.{q,k,v,o}_proj and mlp.{gate,up,down}_proj, as mlx-lm builds them.
DENSE_TYPES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"}
)
EXPERT_TYPES = frozenset({"mixtral", "qwen2_moe", "qwen3_moe"})
ALWAYS_TIED_TYPES = frozenset({"gemma", "gemma2", "gemma3_text"})
NEVER_TIED_TYPES = frozenset({"qwen2_moe"})
# In these the width of a head does not follow from hidden size and heads.
OWN_HEAD_DIM_TYPES = frozenset({"gemma", "gemma2", "gemma3_text", "qwen3", "qwen3_moe"})
EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True)
class Module:
    """One matrix, or several of one shape.

    name: within its layer, or from the root.
    experts: how many matrices it is.
    """

    name: str
    inputs: int
    outputs: int
    experts: int = 1

    @property
    def parameters(self) -> int:
        """Parameters of the frozen weight, without bias."""
        return self.experts * self.inputs * self.outputs

    @property
    def rows(self) -> int:
        """Rows of the stored weight, which an embedding has one of for each input."""
        return self.inputs if self.name == EMBEDDING else self.outputs

    @property
    def row_width(self) -> int:
        """Numbers in a row of the stored weight."""
        return self.outputs if self.name == EMBEDDING else self.inputs

    @property
    def adapter_parameters(self) -> int:
        """Parameters of a rank-1 LoRA adapter; rank r has r times as many (arXiv 2106.09685)."""
        return self.experts * (self.inputs + self.outputs)


@dataclass(frozen=True)
class ModelShape:
    """A model's adaptable modules: `layers` from the bottom up, `roots` outside of them."""

    hidden_size: int
    heads: int
    vocabulary: int
    layers: tuple[tuple[Module, ...], ...]
    roots: tuple[Module, ...]

    @property
    def parameters(self) -> int:
        """Parameters of all matrices; norms and biases, far below one per cent, are left out."""
        return sum(module.parameters for module in self.modules)

    @property
    def modules(self) -> tuple[Module, ...]:
        """All of them, the roots first."""
        return (*self.roots, *(module for layer in self.layers for module in layer))

    @property
    def layer_names(self) -> frozenset[str]:
        return frozenset(module.name for layer in self.layers for module in layer)

    @property
    def root_names(self) -> frozenset[str]:
        return frozenset(module.name for module in self.roots)


def model_shape(config: Mapping[str, Any]) -> ModelShape | None:
    """Return the shape of a model from its config.json, or None when it cannot be known.

    Shapes as in mlx-lm's models of the same `model_type`.
    """
    model_type = config.get("model_type")
    if model_type not in DENSE_TYPES | EXPERT_TYPES:
        return None
    try:
        layers = tuple(
            (*_attention(config), *_feed_forward(config, index))
            for index in range(_number(config, "num_hidden_layers"))
        )
        hidden, vocabulary = _number(config, "hidden_size"), _number(config, "vocab_size")
        heads = _number(config, "num_attention_heads")
    except _UnknownShape:
        return None
    roots = [Module(EMBEDDING, vocabulary, hidden)]
    if not _ties_embeddings(config):
        roots.append(Module("lm_head", hidden, vocabulary))
    return ModelShape(hidden, heads, vocabulary, layers, tuple(roots))


def _ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Return whether input and output embeddings are one matrix; defaults as in mlx-lm."""
    model_type = config["model_type"]
    if model_type in ALWAYS_TIED_TYPES | NEVER_TIED_TYPES:
        return model_type in ALWAYS_TIED_TYPES
    return bool(config.get("tie_word_embeddings", model_type not in EXPERT_TYPES))


class _UnknownShape(Exception):
    """A number that the shape needs is missing from the config."""


def _number(config: Mapping[str, Any], *keys: str) -> int:
    """Return the first of these keys that holds a positive whole number."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise _UnknownShape


def _attention(config: Mapping[str, Any]) -> Iterator[Module]:
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    kv_heads = _number(config, "num_key_value_heads", "num_attention_heads")
    if config.get("head_dim") is None and config["model_type"] not in OWN_HEAD_DIM_TYPES:
        head_dim = hidden // heads
    else:
        head_dim = _number(config, "head_dim")
    yield Module("self_attn.q_proj", hidden, heads * head_dim)
    yield Module("self_attn.k_proj", hidden, kv_heads * head_dim)
    yield Module("self_attn.v_proj", hidden, kv_heads * head_dim)
    yield Module("self_attn.o_proj", heads * head_dim, hidden)


def _gated(prefix: str, hidden: int, inner: int, experts: int = 1) -> Iterator[Module]:
    yield Module(f"{prefix}.gate_proj", hidden, inner, experts)
    yield Module(f"{prefix}.up_proj", hidden, inner, experts)
    yield Module(f"{prefix}.down_proj", inner, hidden, experts)


def _feed_forward(config: Mapping[str, Any], index: int) -> Iterator[Module]:
    """Yield the feed-forward modules of layer `index`: one block, or a router and its experts."""
    hidden = _number(config, "hidden_size")
    if config["model_type"] == "mixtral":
        experts = _number(config, "num_local_experts")
        yield Module("block_sparse_moe.gate", hidden, experts)
        inner = _number(config, "intermediate_size")
        yield from _gated("block_sparse_moe.switch_mlp", hidden, inner, experts)
    elif _has_experts(config, index):
        experts = _number(config, "num_experts")
        yield Module("mlp.gate", hidden, experts)
        inner = _number(config, "moe_intermediate_size")
        yield from _gated("mlp.switch_mlp", hidden, inner, experts)
        if config["model_type"] == "qwen2_moe":
            shared = _number(config, "shared_expert_intermediate_size")
            yield from _gated("mlp.shared_expert", hidden, shared)
            yield Module("mlp.shared_expert_gate", hidden, 1)
    else:
        yield from _gated("mlp", hidden, _number(config, "intermediate_size"))


def _has_experts(config: Mapping[str, Any], index: int) -> bool:
    if config["model_type"] == "qwen2_moe":
        return True
    if config["model_type"] != "qwen3_moe":
        return False
    dense_only = config.get("mlp_only_layers") or []
    return index not in dense_only and (index + 1) % _number(config, "decoder_sparse_step") == 0
