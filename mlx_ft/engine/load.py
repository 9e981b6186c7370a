"""Load a model's weights in the form that suits this machine.

Does not: resolve names (`model/resolve.py`), or render conversations (`model/chat.py`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.utils import _get_classes, dequantize_model
from mlx_lm.utils import load_model as mlx_lm_load_model

from mlx_ft.engine.adapters import attach_adapter
from mlx_ft.engine.device import configure_backend, on_cpu
from mlx_ft.errors import Fault, ModelError
from mlx_ft.model.chat import ChatFormat, ChatRenderer


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with its renderer.

    compute: how it is held and computed, in words.
    """

    model: nn.Module
    renderer: ChatRenderer
    config: dict[str, Any]
    compute: str


def scalar(array: mx.array) -> float:
    """Return a one-element array as a Python number."""
    value = array.item()
    assert not isinstance(value, complex)
    return float(value)


def hold_for_cpu(model: nn.Module) -> nn.Module:
    """Return the model dequantized and in float32: same weights, the only type fast on a CPU.

    Quantized matmul on x86 runs at about 1/80 of float32 through OpenBLAS; the float32 weights are
    exactly the numbers that the quantized file stands for.
    """
    model = dequantize_model(model)
    model.update(tree_map(_to_float32, model.parameters()))
    mx.eval(model.parameters())
    return model


def widen_scales(model: nn.Module) -> nn.Module:
    """Put the scales of a model's quantized layers in float32; return the model.

    Expanding the layers then rounds nothing; in the scales' own type it rounds each weight to 16
    bits.
    """
    for _, module in model.named_modules():
        for name in ("scales", "biases"):
            if "scales" in module and name in module:
                module[name] = _to_float32(module[name])
    return model


def _to_float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def read_lazily(
    folder: Path, classes: Callable[[Mapping[str, Any]], tuple[Any, Any]] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return (model, config) of a model folder, no weight read before it is used.

    `classes` gives the model's class and that of its arguments for a config, in place of mlx-lm's.
    Raises ModelError when mlx-lm does not know the architecture or the weights do not fit it.
    """
    try:
        model, config = mlx_lm_load_model(
            folder, lazy=True, trust_remote_code=False, get_model_classes=classes or _get_classes
        )
    except (ValueError, TypeError, FileNotFoundError, RuntimeError, KeyError) as error:
        raise ModelError(
            Fault(str(folder), f"mlx-lm cannot load it ({error})", "use a model that mlx-lm runs")
        ) from error
    return model, config


def load_weights(folder: Path, low_memory: bool = False) -> tuple[nn.Module, dict[str, Any], str]:
    """Return (model, config, compute) of a model folder, held as suits this machine, or with
    `low_memory` as stored and not read yet. Raises ModelError.
    """
    configure_backend()
    model, config = read_lazily(folder)
    if low_memory:
        compute = f"{mx.default_device()}, weights as stored, read when they are used"
    elif on_cpu():
        model = hold_for_cpu(model)
        compute = "float32 on the CPU (quantized weights expanded, value for value)"
    else:
        mx.eval(model.parameters())
        compute = f"{mx.default_device()}, weights as stored"
    model.eval()
    return model, config, compute


def load_layers(folder: Path, count: int, low_memory: bool = False) -> list[nn.Module]:
    """Return the first `count` layers of a model folder as `load_weights` would hold them; the rest
    of the model is not read.
    """
    configure_backend()
    model, _ = read_lazily(folder)
    layers: list[nn.Module] = model.model.layers[:count]
    if not low_memory and on_cpu():
        layers = hold_for_cpu(nn.Sequential(*layers)).layers
    return layers


def load_model(
    folder: Path,
    chat: ChatFormat,
    *,
    adapter: Path | None = None,
    low_memory: bool = False,
) -> LoadedModel:
    """Load a model folder, with an adapter if one is given, and its renderer. Raises ModelError."""
    renderer = ChatRenderer.from_folder(folder, chat)
    model, config, compute = load_weights(folder, low_memory)
    if adapter is not None:
        attach_adapter(model, adapter)
    return LoadedModel(model, renderer, config, compute)


def release() -> None:
    """Give memory of models without references back to the system."""
    gc.collect()
    mx.clear_cache()
