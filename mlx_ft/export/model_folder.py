"""Config, tokenizer and README of a model folder that mlx-lm and others load.

Does: begin a folder; finish it by copying the base's tokenizer files byte for byte, and writing the
config last, without which no program takes the folder for a model.
Does not: compute weights, or write into a folder that is not empty.
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
from mlx_ft.export.safetensors_writer import Layout, WeightsWriter

# Files of a model folder that do not depend on its weights.
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
NOT_COPIED = ("config.json", "model.safetensors.index.json", "manifest.json", "README.md")


def require_empty(folder: Path) -> None:
    """Raise RunError unless `folder` is new or empty: stale shards would override fresh weights."""
    if folder.exists() and any(folder.iterdir()):
        raise RunError(
            Fault(str(folder), "is not empty", "delete it, or choose another output folder")
        )


def begin_folder(folder: Path) -> None:
    """Make an empty model folder. Raises RunError when it is not empty."""
    require_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)


def finish_folder(folder: Path, base: Path, config: Mapping[str, Any], card: str) -> None:
    """Write everything but the weights into a model folder, the config last.

    card: text of its README.
    """
    for pattern in COPIED:
        for source in sorted(base.glob(pattern)):
            if source.name not in NOT_COPIED:
                shutil.copyfile(source, folder / source.name)
    (folder / "README.md").write_text(card, encoding="utf-8")
    text = json.dumps(dict(sorted(config.items())), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def write_model_folder(
    folder: Path, base: Path, model: nn.Module, config: Mapping[str, Any], card: str
) -> int:
    """Write a model that is in memory, or lazy, as a complete folder.

    Returns the size of its weights (bytes). A tensor is computed when it is written, then freed.
    Raises RunError.
    """
    begin_folder(folder)
    weights = dict(tree_flatten(model.parameters()))
    layouts = {name: Layout(tuple(array.shape), array.dtype) for name, array in weights.items()}
    with WeightsWriter(folder, layouts) as writer:
        for name in layouts:
            array = weights.pop(name)
            mx.eval(array)
            writer.write(name, 0, array)
            del array
            mx.clear_cache()
        total_bytes = writer.finish()
    finish_folder(folder, base, config, card)
    return total_bytes
