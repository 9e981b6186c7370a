"""What a GPU does that this machine's CPU does not: products that depend on shapes, attention that
refuses a gradient. Emulated from the rules of MLX 0.32.4's Metal kernels.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn

from tests.support.models import TINY_CONFIGS, write_stored_model
from tests.support.split_models import MORE_CONFIGS

TILE = 32
# Metal aims at 512; miniatures have a sixteenth of the tiles, or less.
THREADGROUPS = 32
VECTOR_QUERIES = 8

# Head size 64, so that fused kernels would be reached.
WIDER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
GPU_CONFIGS: dict[str, dict[str, Any]] = {
    kind: (TINY_CONFIGS | MORE_CONFIGS)[kind] | WIDER
    for kind in ("llama", "qwen3", "gemma3_text", "qwen3_moe")
}
# Name -> type of weights and activations, bits of quantized weights.
BASE_TYPES: dict[str, tuple[mx.Dtype, int | None]] = {
    "bfloat16": (mx.bfloat16, None),
    "float16": (mx.float16, None),
    "4-bit": (mx.bfloat16, 4),
    "5-bit": (mx.bfloat16, 5),
}


def write_gpu_model(folder: Path, kind: str, base_type: str, layers: int = 3) -> Path:
    """Write a random model of a kind with its weights in one of BASE_TYPES."""
    config = GPU_CONFIGS[kind] | {"num_hidden_layers": layers}
    return write_stored_model(folder, config, *BASE_TYPES[base_type])


def split_of_k(rows: int, outputs: int, inputs: int, group: int) -> int:
    """Return into how many parts Metal's product splits the sums over `inputs`."""
    tiles = -(-outputs // TILE) * -(-rows // TILE)
    parts = max(1, min(THREADGROUPS // tiles, inputs // max(group, TILE)))
    while inputs % parts:
        parts -= 1
    return parts


def metal_product(values: mx.array, weight: mx.array, group: int = TILE) -> mx.array:
    """Return values @ weight.T with each part of a sum rounded to 16 bits."""
    outputs, inputs = weight.shape
    parts = split_of_k(values.size // inputs, outputs, inputs, group)
    wide, other = values.astype(mx.float32), weight.astype(mx.float32)
    total: mx.array = mx.zeros((1,))
    pieces = zip(mx.split(wide, parts, -1), mx.split(other, parts, -1), strict=True)
    for one, two in pieces:
        total = total + (one @ two.T).astype(values.dtype).astype(mx.float32)
    return total.astype(values.dtype)


def _is_short(array: mx.array) -> bool:
    return array.dtype in (mx.float16, mx.bfloat16)


def _expanded(layer: Any) -> mx.array:
    weight: mx.array = mx.dequantize(
        layer.weight,
        layer.scales,
        layer.biases,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )
    return weight


@contextmanager
def shape_dependent_products() -> Iterator[None]:
    """Within, products of 16-bit and quantized layers depend on their shapes, as on Metal."""
    places = (
        (nn.Linear, "__call__", False),
        (nn.Embedding, "as_linear", False),
        (nn.QuantizedLinear, "__call__", True),
        (nn.QuantizedEmbedding, "as_linear", True),
    )

    def emulated(plain: Any, quantized: bool) -> Any:
        def product(layer: Any, values: mx.array) -> mx.array:
            if not _is_short(values):
                outputs: mx.array = plain(layer, values)
                return outputs
            weight = _expanded(layer) if quantized else layer.weight
            outputs = metal_product(values, weight, layer.group_size if quantized else TILE)
            return outputs + layer.bias if "bias" in layer else outputs

        return product

    gather: Any = mx.gather_mm

    def gathered(values: mx.array, weight: mx.array, **named: Any) -> mx.array:
        # The experts of a mixture: a CPU multiplies them in float32 only, a GPU in any type.
        dtype = mx.result_type(values, weight)
        wide = (each.astype(mx.float32) for each in (values, weight))
        outputs: mx.array = gather(*wide, **named).astype(dtype)
        return outputs

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(mx, "gather_mm", gathered))
        for place, name, quantized in places:
            replacement = emulated(getattr(place, name), quantized)
            stack.enter_context(mock.patch.object(place, name, replacement))
        yield


@contextmanager
def training_attention() -> Iterator[None]:
    """Within, the gradient of fused attention throws where MLX 0.32.4's does on Metal."""
    fused: Any = mx.fast.scaled_dot_product_attention

    def attention(
        queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, **named: Any
    ) -> mx.array:
        @mx.custom_function
        def guarded(*arrays: mx.array) -> mx.array:
            outputs: mx.array = fused(*arrays, scale=scale, **named)
            return outputs

        @guarded.vjp
        def gradient(arrays: Any, slope: Any, _: Any) -> Any:
            if arrays[0].shape[-2] <= VECTOR_QUERIES:
                raise RuntimeError("the vector kernels do not produce a logsumexp")
            if named.get("sinks") is not None:
                raise RuntimeError("[ScaledDotProductAttentionVJP] NYI: attention sinks")
            return tuple(
                mx.vjp(lambda *again: fused(*again, scale=scale, **named), list(arrays), [slope])[1]
            )

        found: Any = guarded(queries, keys, values)
        outputs: mx.array = found
        return outputs

    with mock.patch.object(mx.fast, "scaled_dot_product_attention", attention):
        yield
