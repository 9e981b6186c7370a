"""Tensor names, shapes and offsets of safetensors files, without reading tensors.

Does not: import MLX.

The format: 8 bytes of header length, a JSON header (name -> dtype, shape, offsets), then the data
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def tensor_headers(file: Path) -> dict[str, tuple[dict[str, Any], int]]:
    """Return each tensor's entry in a safetensors header, with the place where the data begin.

    Raises ValueError for a file that does not begin with a header.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 0 < size <= file.stat().st_size - 8:
            raise ValueError("it does not begin with a safetensors header")
        header = json.loads(stream.read(size))
    return {name: (entry, 8 + size) for name, entry in header.items() if name != "__metadata__"}


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a whole safetensors file; ValueError for any other."""
    shapes: dict[str, tuple[int, ...]] = {}
    size = file.stat().st_size
    try:
        for name, (entry, data) in tensor_headers(file).items():
            if data + int(entry["data_offsets"][1]) > size:
                raise ValueError("the file is cut off")
            shapes[name] = tuple(int(length) for length in entry["shape"])
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError("its safetensors header is not one") from error
    return shapes


def dequantized_shapes(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a model folder as it is after dequantization.

    A quantized weight's columns are those of its scales times their group size, which is the
    model's, or the layer's own in its config.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        shapes |= {name: tuple(entry["shape"]) for name, (entry, _) in tensor_headers(file).items()}
    settings: Mapping[str, Any] = config.get("quantization") or {}
    plain = {}
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        scales = shapes.get(f"{module}.scales")
        if scales is None or leaf not in ("weight", "scales", "biases"):
            plain[name] = shape
        elif leaf == "weight":
            own = settings.get(module)
            group_size = (own if isinstance(own, Mapping) else settings).get("group_size", 64)
            plain[name] = (*shape[:-1], scales[-1] * group_size)
    return plain
