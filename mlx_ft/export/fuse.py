"""Arithmetic of the export: adapter into weights, quantized into 16 bits, 16 bits into q bits.

Everything is lazy: a tensor is computed when it is saved. The sum base + delta is taken in float32
and rounded once. Does not: write files, or judge the result.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.utils import dequantize_model
from mlx_lm.utils import load_model as mlx_lm_load_model

from mlx_ft.backend import configure_backend
from mlx_ft.errors import Fault, GateFailed
from mlx_ft.inference import attach_adapter, scalar

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16}
QUANTIZATION_KEYS = ("quantization", "quantization_config")


@dataclass(frozen=True)
class FusedModel:
    """A model whose weights are fused and 16-bit (lazily), its config, and what was fused."""

    model: nn.Module
    config: dict[str, Any]
    fused_modules: tuple[str, ...]


def _widen_scales(model: nn.Module) -> None:
    """Make affine dequantization compute in float32, whatever type the scales are stored in."""
    for _, module in model.named_modules():
        if "scales" in module and mx.issubdtype(module.scales.dtype, mx.floating):
            module.scales = module.scales.astype(mx.float32)
            if "biases" in module:
                module.biases = module.biases.astype(mx.float32)


def fuse(base: Path, adapter: Path, dtype: str) -> FusedModel:
    """Return base + adapter, dequantized, in `dtype`.

    Raises ModelError when the adapter does not fit the base entirely, GateFailed when not every
    adapted layer was fused or a number does not fit `dtype`.
    """
    configure_backend()
    model, config = mlx_lm_load_model(base, lazy=True, trust_remote_code=False)
    kind = attach_adapter(model, adapter).get("fine_tune_type", "lora")
    trained = {name.rsplit(".", 1)[0] for name, _ in tree_flatten(model.trainable_parameters())}
    adapted = sorted(trained)
    _widen_scales(model)
    fused = [
        (name, module.fuse(dequantize=True))
        for name, module in model.named_modules()
        if hasattr(module, "fuse") and "lora_a" in module
    ]
    done = adapted if kind == "full" else sorted(name for name, _ in fused)
    if done != adapted or not adapted:
        raise GateFailed(
            Fault(str(adapter), f"{len(fused)} of {len(adapted)} layers fused", "report this")
        )
    model.update_modules(tree_unflatten(fused))
    model = dequantize_model(model)
    _require_range(model, dtype)
    cast_floats(model, DTYPES[dtype])
    plain = {k: v for k, v in config.items() if k not in QUANTIZATION_KEYS}
    plain["torch_dtype"] = dtype
    return FusedModel(model, plain, tuple(adapted))


def cast_floats(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast every floating-point parameter of the model."""
    model.update(tree_map(lambda array: _cast(array, dtype), model.parameters()))


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def _require_range(model: nn.Module, dtype: str) -> None:
    """Raise GateFailed when a weight would overflow float16 (largest finite number 65,504)."""
    if dtype != "float16":
        return
    faults = []
    for name, array in tree_flatten(model.parameters()):
        largest = scalar(mx.abs(array.astype(mx.float32)).max())
        if not largest <= 65504.0:
            faults.append(
                Fault(name, f"its largest number is {largest:.3g}", "set export.dtype: bfloat16")
            )
    if faults:
        raise GateFailed(faults)


def quantize(
    model: nn.Module,
    config: Mapping[str, Any],
    bits: int,
    group_size: int,
    already: Sequence[str] = (),
) -> tuple[nn.Module, dict[str, Any], tuple[str, ...]]:
    """Return (model, config, quantized modules) with every layer that can be at `bits` bits.

    Modules that are quantized `already` are counted and left as they are. A layer whose input is
    not a multiple of `group_size` stays 16-bit, as in mlx-lm. GateFailed when none can be.
    """
    quantized = list(already)

    def wanted(path: str, module: nn.Module) -> bool:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group_size:
            return False
        quantized.append(path)
        return True

    nn.quantize(model, group_size, bits, class_predicate=wanted)
    if not quantized:
        raise GateFailed(
            Fault(
                "export.q_group_size",
                f"no layer's input is a multiple of {group_size}",
                "use a smaller group size",
            )
        )
    settings = {"group_size": group_size, "bits": bits, "mode": "affine"}
    described = copy.deepcopy(dict(config))
    # mlx-lm reads the first key, the Hugging Face Hub the second.
    described.update(quantization=settings, quantization_config=dict(settings))
    return model, described, tuple(quantized)
