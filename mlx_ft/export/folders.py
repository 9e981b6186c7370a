"""Write a model folder that mlx-lm and others load as it is: weights, config, tokenizer, template.

Does: shard and index the weights, copy the base's tokenizer files byte for byte. Does not: compute
weights, or write into a folder that has anything in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_ft.errors import Fault, RunError

MAX_SHARD_BYTES = 2 << 30
# Files of a model folder that stay true when its weights change.
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
NOT_COPIED = ("config.json", "model.safetensors.index.json", "manifest.json", "README.md")


def require_empty(folder: Path) -> None:
    """Raise RunError unless `folder` is new or empty: stale shards would override fresh weights."""
    if folder.exists() and any(folder.iterdir()):
        raise RunError(
            Fault(str(folder), "is not empty", "delete it, or choose another output folder")
        )


def shard_names(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Return tensor names in order, cut into shards of at most `limit` bytes (one tensor at
    least).
    """
    shards: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not shards or held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def write_weights(folder: Path, model: nn.Module) -> int:
    """Write the model's parameters as sharded safetensors with an index; return their bytes.

    Tensors are computed a shard at a time and released.
    """
    weights = dict(tree_flatten(model.parameters()))
    sizes = {name: int(array.nbytes) for name, array in weights.items()}
    shards = shard_names(sizes, MAX_SHARD_BYTES)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: weights.pop(name) for name in names}
        mx.save_safetensors(str(folder / file), tensors, metadata={"format": "mlx"})
        weight_map.update(dict.fromkeys(names, file))
        del tensors
        mx.clear_cache()
    total_bytes = sum(sizes.values())
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    text = json.dumps(index, indent=1)
    (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
    return total_bytes


def write_model_folder(
    folder: Path, base: Path, model: nn.Module, config: Mapping[str, Any], card: str
) -> int:
    """Write a complete model folder and return the bytes of its weights. Raises RunError."""
    require_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    total_bytes = write_weights(folder, model)
    for pattern in COPIED:
        for source in sorted(base.glob(pattern)):
            if source.name not in NOT_COPIED:
                shutil.copyfile(source, folder / source.name)
    text = json.dumps(dict(sorted(config.items())), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    return total_bytes
