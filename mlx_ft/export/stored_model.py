"""A model folder opened lazily: its structure, and weights that are read some rows at a time.

Does: let mlx-lm build the model without reading a weight; read rows directly from the files where
mlx-lm leaves a tensor unchanged, else through the model's own lazy array.
Does not: dequantize, or change the model that mlx-lm builds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from mlx_ft.engine.load import read_lazily
from mlx_ft.export.safetensors_writer import flat_rows
from mlx_ft.model.safetensors_headers import tensor_headers

# Name of a type in safetensors -> NumPy type that reads its bytes, MLX type.
STORED_TYPES: Mapping[str, tuple[type[np.generic], mx.Dtype]] = {
    "F32": (np.float32, mx.float32),
    "F16": (np.float16, mx.float16),
    "BF16": (np.uint16, mx.bfloat16),
    "U32": (np.uint32, mx.uint32),
    "U8": (np.uint8, mx.uint8),
}


@dataclass(frozen=True)
class _Place:
    """Location of a tensor's bytes. begin: offset in the file. read_as, dtype: their types."""

    file: Path
    begin: int
    read_as: type[np.generic]
    dtype: mx.Dtype


class StoredModel:
    """A model as mlx-lm builds it from a folder, with no weight read yet.

    Tensors have the names that they have in the model.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        loaded: dict[str, mx.array] = {}
        self.model, self.config = read_lazily(folder, lambda config: _recording(config, loaded))
        self.model.__class__ = type(self.model).__mro__[1]
        self.modules: dict[str, nn.Module] = dict(self.model.named_modules())
        name_in_files = {id(array): name for name, array in loaded.items()}
        places = _places(folder)
        self._places: dict[str, _Place] = {}
        self._arrays: dict[str, mx.array] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, mx.Dtype] = {}
        for name, array in tree_flatten(self.model.parameters()):
            self.shapes[name], self.dtypes[name] = tuple(array.shape), array.dtype
            # The same object that was loaded: mlx-lm left it unchanged.
            place = places.get(name_in_files.get(id(array), ""))
            if place is not None and place.dtype == array.dtype:
                self._places[name] = place
            else:
                self._arrays[name] = array
        # A class lives until garbage collection, and so would the arrays that it recorded.
        loaded.clear()

    def rows(self, name: str, first: int, end: int) -> mx.array:
        """Return flat rows of a tensor, (rows, columns); a vector is one row."""
        shape = self.shapes[name]
        columns = shape[-1] if shape else 1
        if name not in self._places:
            if name not in self._arrays:  # forgotten, and wanted again
                self._arrays = StoredModel(self._folder)._arrays
            flat = self._arrays[name].reshape(flat_rows(shape), columns)
            return flat if (first, end) == (0, flat_rows(shape)) else flat[first:end]
        place = self._places[name]
        itemsize = np.dtype(place.read_as).itemsize
        read = np.fromfile(
            place.file,
            place.read_as,
            (end - first) * columns,
            offset=place.begin + first * columns * itemsize,
        )
        array = mx.array(read).reshape(end - first, columns)
        return mx.view(array, mx.bfloat16) if place.dtype == mx.bfloat16 else array

    def forget(self, name: str) -> None:
        """Free a tensor that could not be read row by row, and so is wholly in memory."""
        self._arrays.pop(name, None)


def _recording(config: Mapping[str, Any], loaded: dict[str, mx.array]) -> tuple[Any, Any]:
    """Return mlx-lm's classes for a config; the model's class records its files in `loaded`."""
    model_class, arguments_class = _get_classes(config)

    class Recording(model_class):  # type: ignore[misc, valid-type]  # known when it runs
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            loaded.update(weights)
            if hasattr(model_class, "sanitize"):
                weights = super().sanitize(weights)
            return weights

    return Recording, arguments_class


def _places(folder: Path) -> dict[str, _Place]:
    """Return name -> location of each tensor of the files whose type is in STORED_TYPES."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        for name, (entry, data) in tensor_headers(file).items():
            if entry["dtype"] in STORED_TYPES:
                read_as, dtype = STORED_TYPES[entry["dtype"]]
                begin, end = entry["data_offsets"]
                size = math.prod(entry["shape"]) * np.dtype(read_as).itemsize
                assert end - begin == size, f"{file}: {name} has other bytes than its shape"
                found[name] = _Place(file, data + begin, read_as, dtype)
    return found
