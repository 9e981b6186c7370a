"""A random model of Llama-3.2-3B's shape in 4 bits, for what is measured at that size."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.models import random_model
from tests.support.tokenizers import write_tiny_tokenizer

if TYPE_CHECKING:
    import mlx.core as mx

LLAMA_3B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}
GROUP_SIZE, BITS = 64, 4
# Of a tensor that is made at a time; the embedding has 128,256 rows.
ROWS = 4096


def write_random_quantized(
    folder: Path, config: dict[str, Any], dtype: "mx.Dtype"
) -> dict[str, tuple[int, ...]]:
    """Write a model of this config in 4 bits, its scales and norms of `dtype`, and a tokenizer.

    Few rows at a time, so that little is in memory. Returns the shape of each weight before it was
    quantized.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_ft.export.safetensors_writer import Layout, WeightsWriter

    write_tiny_tokenizer(folder)
    parameters = tree_flatten(random_model(config).parameters())
    shapes = {name: tuple(array.shape) for name, array in parameters}
    layouts: dict[str, Layout] = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            layouts[name] = Layout(shape, dtype)
            continue
        groups = Layout((shape[0], shape[1] // GROUP_SIZE), dtype)
        layouts[name] = Layout((shape[0], shape[1] * BITS // 32), mx.uint32)
        layouts |= {name.replace("weight", leaf): groups for leaf in ("scales", "biases")}
    mx.random.seed(0)
    with WeightsWriter(folder, layouts) as writer:
        for name, shape in shapes.items():
            if len(shape) == 1:
                ones = mx.ones(shape, dtype)
                mx.eval(ones)
                writer.write(name, 0, ones)
                continue
            for first in range(0, shape[0], ROWS):
                rows = min(ROWS, shape[0] - first)
                weight = (mx.random.normal((rows, shape[1])) * 0.02).astype(dtype)
                packed = mx.quantize(weight, GROUP_SIZE, BITS)
                mx.eval(packed)
                for leaf, array in zip(("weight", "scales", "biases"), packed, strict=True):
                    writer.write(name.replace("weight", leaf), first, array)
                mx.clear_cache()
        writer.finish()
    quantization = {"group_size": GROUP_SIZE, "bits": BITS}
    text = json.dumps({**config, "quantization": quantization})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return shapes
