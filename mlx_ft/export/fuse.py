"""Fuse an adapter into the weights of its base, row by row, dequantizing as it goes.

Everything is computed some rows at a time, in float32, and rounded once.
Does not: write files (`safetensors_writer.py`), order the rows (`write_weights.py`), or judge the
result (`verify_checks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from mlx_ft.engine.adapters import attach_adapter
from mlx_ft.engine.device import configure_backend, on_cpu
from mlx_ft.errors import Fault, GateFailed, ModelError
from mlx_ft.export.safetensors_writer import array_bytes, flat_rows, row_ranges
from mlx_ft.export.stored_model import StoredModel

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16}
QUANTIZATION_KEYS = ("quantization", "quantization_config")
# Bits of a 16-bit number, without its sign, from which on it is infinite or NaN.
NOT_FINITE_FROM = {mx.float16: 0x7C00, mx.bfloat16: 0x7F80}

# (first row, end row, those rows of the base) -> those rows with the adapter fused; float32.
FuseRows = Callable[[int, int, mx.array], mx.array]


class Float16Overflow(Exception):
    """A number of the fused model is beyond float16. name: its tensor. largest: the number."""

    def __init__(self, name: str, largest: float) -> None:
        super().__init__(f"the largest number of {name} is {largest:.3g}, float16 ends at 65,504")
        self.name, self.largest = name, largest


@dataclass(frozen=True)
class Weight:
    """One tensor of the fused model, read some rows at a time.

    takes_bits: the format has a quantized form of it. base: (first, end) -> flat rows of the base,
    dequantized to float32 (as stored if they are not floating-point). fuse: adds the adapter (None:
    it does not change this tensor). forget: frees a tensor that had to be read as a whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    takes_bits: bool
    base: Callable[[int, int], mx.array]
    fuse: FuseRows | None
    forget: Callable[[], None]

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in float32."""
        return 4 * (self.shape[-1] if self.shape else 1)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Ranges of rows that are computed one by one."""
        return list(row_ranges(self.shape, self.row_bytes))

    def rows(self, first: int, end: int) -> mx.array:
        """Return flat rows with the adapter fused, in float32; integers as stored."""
        base = self.base(first, end)
        return base if self.fuse is None else self.fuse(first, end, base)

    def half_rows(self, first: int, end: int) -> mx.array:
        """Return flat rows of the 16-bit model."""
        rows = self.rows(first, end)
        return rows.astype(self.dtype) if mx.issubdtype(rows.dtype, mx.floating) else rows

    def chosen(self, rows: Sequence[int]) -> mx.array:
        """Return single rows (number, columns) of the 16-bit model."""
        return mx.concatenate([self.half_rows(row, row + 1) for row in rows])

    def whole(self, rows: Callable[[int, int], mx.array] | None = None) -> mx.array:
        """Return the whole tensor of the 16-bit model, or the tensor that `rows` gives.

        Each part is evaluated before the next begins: unpacking takes several times its result.
        """
        parts = []
        for first, end in self.ranges:
            parts.append((rows or self.half_rows)(first, end))
            mx.eval(parts[-1])
        whole = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        return whole.reshape(self.shape)

    def require_finite(self, first: int, end: int, half: mx.array) -> None:
        """Check evaluated 16-bit rows for infinity and NaN.

        Raises Float16Overflow when the number is finite in float32, GateFailed when it is not.
        """
        limit = NOT_FINITE_FROM.get(half.dtype)
        if limit is None or half.size == 0:
            return
        bits = array_bytes(mx.view(half, mx.uint16))
        if int(np.bitwise_and(bits, 0x7FFF).max()) < limit:
            return
        largest = float(mx.abs(self.rows(first, end)).max().item())  # type: ignore[arg-type]  # one
        if half.dtype == mx.float16 and np.isfinite(largest):
            raise Float16Overflow(self.name, largest)
        found = f"its largest number is {largest:.3g}"
        raise GateFailed(Fault(self.name, found, "train again with a lower train.learning_rate"))


@dataclass(frozen=True)
class FusedModel:
    """A fused 16-bit model.

    weights: name -> weight, computed on demand. config: its config.json. fused_modules: the modules
    that were fused. plain: its structure without weights; `load` fills a part of it for a while.
    """

    weights: Mapping[str, Weight]
    config: dict[str, Any]
    fused_modules: tuple[str, ...]
    plain: nn.Module

    def load(self, prefix: str, *, wide: bool = True) -> None:
        """Compute the weights whose names begin with `prefix`, and put them into `plain`.

        wide: in float32 on every device; otherwise in 16 bits where MLX computes with 16 bits, so
        that a whole model fits.
        """
        for name, weight in self._under(prefix):
            half = weight.whole()
            mx.eval(half)
            weight.require_finite(0, flat_rows(weight.shape), half)
            array = widened(half) if wide or on_cpu() else half
            mx.eval(array)
            self.plain.load_weights([(name, array)], strict=False)

    def unload(self, prefix: str) -> None:
        """Free the weights that `load` put into `plain`."""
        for name, weight in self._under(prefix):
            self.plain.load_weights([(name, mx.zeros((0,)))], strict=False)
            weight.forget()
        mx.clear_cache()

    def _under(self, prefix: str) -> list[tuple[str, Weight]]:
        return [(name, w) for name, w in self.weights.items() if name.startswith(prefix)]


def widened(array: mx.array) -> mx.array:
    """Return a 16-bit array in float32; integers unchanged.

    Models compared in float32 differ by their weights, and not by the rounding of a device.
    """
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def fuse(base: Path, adapter: Path | None, dtype: str) -> FusedModel:
    """Return base + adapter, dequantized, in `dtype`; without an adapter the base alone.

    Raises ModelError when the adapter does not fit the base entirely, or the base has layers that
    cannot be dequantized; GateFailed when some adapted layer cannot be fused.
    """
    configure_backend()
    stored = StoredModel(base)
    fusing, modules = ({}, ()) if adapter is None else _read_adapter(base, adapter)
    weights = _weights(stored, fusing, DTYPES[dtype])
    lost = sorted(fusing.keys() - weights.keys())
    if lost:
        raise GateFailed(
            Fault(str(adapter), f"{lost[0]} cannot be fused", "report this with the model's name")
        )
    config = {k: v for k, v in stored.config.items() if k not in QUANTIZATION_KEYS}
    config["torch_dtype"] = dtype
    plain = plain_structure(stored.model)
    for module in (plain, *stored.modules.values()):  # replaced modules too
        _drop_weights(module)
    plain.eval()
    return FusedModel(weights, config, modules, plain)


def _read_adapter(base: Path, adapter: Path) -> tuple[dict[str, FuseRows], tuple[str, ...]]:
    """Return tensor name -> function that fuses the adapter into its rows, and adapted modules."""
    model = StoredModel(base).model
    kind = attach_adapter(model, adapter).get("fine_tune_type", "lora")
    trained = tree_flatten(model.trainable_parameters())
    adapted = tuple(sorted({name.rsplit(".", 1)[0] for name, _ in trained}))
    if kind == "full":
        return {name: _replacing(array) for name, array in trained}, adapted
    fusing = {
        f"{name}.weight": _fusing(module)
        for name, module in model.named_modules()
        if "lora_a" in module and type(module) in _FUSED_KINDS
    }
    missing = sorted(set(adapted) - {name.removesuffix(".weight") for name in fusing})
    if missing or not adapted:
        found = f"{len(fusing)} of {len(adapted)} layers fused"
        raise GateFailed(Fault(str(adapter), f"{found} ({', '.join(missing[:3])})", "report this"))
    return fusing, adapted


_FUSED_KINDS = (LoRALinear, LoRASwitchLinear, LoRAEmbedding, DoRALinear, DoRAEmbedding)


def _fusing(module: nn.Module) -> FuseRows:
    """Return the function that adds a layer's low-rank product to rows of its weight."""
    scale = float(module.scale)
    one, other = _wide(module.lora_a), _wide(module.lora_b)

    def linear(first: int, end: int, rows: mx.array) -> mx.array:
        return rows + (scale * other.T)[first:end] @ one.T

    def embedding(first: int, end: int, rows: mx.array) -> mx.array:
        return rows + (scale * one)[first:end] @ other

    def expert(first: int, end: int, rows: mx.array) -> mx.array:
        outputs = other.shape[1]
        deltas = []
        for number in range(first // outputs, -(-end // outputs)):
            begin, last = max(first - number * outputs, 0), min(end - number * outputs, outputs)
            deltas.append((scale * other[number])[begin:last] @ one[number])
        return rows + (deltas[0] if len(deltas) == 1 else mx.concatenate(deltas))

    if isinstance(module, LoRASwitchLinear):
        return expert
    plain = embedding if isinstance(module, LoRAEmbedding | DoRAEmbedding) else linear
    if not isinstance(module, DoRALinear | DoRAEmbedding):
        return plain
    magnitude = _wide(module.m)

    def directed(first: int, end: int, rows: mx.array) -> mx.array:
        moved = plain(first, end, rows)
        return (magnitude[first:end] / mx.linalg.norm(moved, axis=1))[:, None] * moved

    return directed


def _replacing(array: mx.array) -> FuseRows:
    flat = _wide(array).reshape(flat_rows(tuple(array.shape)), -1)
    return lambda first, end, rows: flat[first:end]


def _wide(array: mx.array) -> mx.array:
    return array.astype(mx.float32)


def _weights(
    stored: StoredModel, fusing: Mapping[str, FuseRows], dtype: mx.Dtype
) -> dict[str, Weight]:
    """Return the weights of the fused model in the model's own order."""
    weights = {}
    for name, shape in stored.shapes.items():
        owner, _, leaf = name.rpartition(".")
        module = stored.modules[owner]
        packed = "scales" in module and leaf in ("weight", "scales", "biases")
        if packed and leaf != "weight":
            continue
        if packed:
            _require_known(owner, module)
            inputs = stored.shapes[f"{owner}.scales"][-1] * module.group_size
            shape = (*shape[:-1], inputs)
        elif not mx.issubdtype(stored.dtypes[name], mx.floating):
            weights[name] = _as_stored(stored, name)
            continue
        weights[name] = Weight(
            name,
            shape,
            dtype,
            packed or (leaf == "weight" and hasattr(module, "to_quantized")),
            _dequantized(stored, owner, module) if packed else _floats(stored, name),
            fusing.get(name),
            _forgetting(stored, name, owner if packed else None),
        )
    return weights


def _as_stored(stored: StoredModel, name: str) -> Weight:
    def rows(first: int, end: int) -> mx.array:
        return stored.rows(name, first, end)

    forget = _forgetting(stored, name, None)
    return Weight(name, stored.shapes[name], stored.dtypes[name], False, rows, None, forget)


def _floats(stored: StoredModel, name: str) -> Callable[[int, int], mx.array]:
    return lambda first, end: _wide(stored.rows(name, first, end))


def _dequantized(
    stored: StoredModel, owner: str, module: nn.Module
) -> Callable[[int, int], mx.array]:
    """Return the function that dequantizes rows of a weight.

    Affine weights are computed in float32, whatever type their scales are stored in.
    """
    has_biases = f"{owner}.biases" in stored.shapes

    def rows(first: int, end: int) -> mx.array:
        scales = stored.rows(f"{owner}.scales", first, end)
        biases = stored.rows(f"{owner}.biases", first, end) if has_biases else None
        if mx.issubdtype(scales.dtype, mx.floating):  # else those of a mode without biases
            scales, biases = _wide(scales), None if biases is None else _wide(biases)
        packed = stored.rows(f"{owner}.weight", first, end)
        return _wide(
            mx.dequantize(packed, scales, biases, module.group_size, module.bits, module.mode)
        )

    return rows


def _forgetting(stored: StoredModel, name: str, owner: str | None) -> Callable[[], None]:
    names = [name] if owner is None else [f"{owner}.{leaf}" for leaf in PACKED_LEAVES]

    def forget() -> None:
        for each in names:
            stored.forget(each)

    return forget


PACKED_LEAVES = ("weight", "scales", "biases")
# Class of a quantized layer -> maker of the plain layer, from (inputs, outputs, stack, bias).
_PLAIN_KINDS: Mapping[type, Callable[[int, int, int, bool], nn.Module]] = {
    nn.QuantizedLinear: lambda inputs, outputs, _, bias: nn.Linear(inputs, outputs, bias),
    nn.QuantizedEmbedding: lambda inputs, outputs, _, bias: nn.Embedding(outputs, inputs),
    QuantizedSwitchLinear: lambda inputs, outputs, n, bias: SwitchLinear(inputs, outputs, n, bias),
    QuantizedMultiLinear: lambda inputs, outputs, n, bias: MultiLinear(inputs, outputs, n),
}


def _require_known(name: str, module: nn.Module) -> None:
    """Raise ModelError for a quantized layer that has no plain counterpart here."""
    if type(module) not in _PLAIN_KINDS or "global_scale" in module:
        found = f"a {type(module).__name__} of mode {module.get('mode', '?')}"
        fix = "set export.base to the 16-bit original, or use another model"
        raise ModelError(Fault(name, f"{found} cannot be dequantized", fix))


def plain_structure(model: nn.Module) -> nn.Module:
    """Replace a model's quantized layers by plain layers with arbitrary weights."""
    plain = []
    for name, module in model.named_modules():
        if "scales" in module:
            _require_known(name, module)
            plain.append((name, plain_layer(module)))
    model.update_modules(tree_unflatten(plain))
    return model


def plain_layer(module: nn.Module) -> nn.Module:
    """Return the plain layer that replaces a quantized one, with an arbitrary weight."""
    stack = module.weight.shape[0] if module.weight.ndim > 2 else 1
    outputs, inputs = module.scales.shape[-2], module.scales.shape[-1] * module.group_size
    plain = _PLAIN_KINDS[type(module)](inputs, outputs, stack, "bias" in module)
    if "bias" in module:
        plain.bias = module.bias
    return plain


def _drop_weights(model: nn.Module) -> None:
    model.update(tree_map(lambda array: mx.zeros((0,), array.dtype), model.parameters()))


def half_names(fused: FusedModel, group_size: int) -> tuple[str, ...]:
    """Return the weights that could be quantized if their rows were whole groups."""
    return tuple(
        name
        for name, weight in fused.weights.items()
        if weight.takes_bits and weight.shape[-1] % group_size
    )


def quantized_names(fused: FusedModel, group_size: int) -> tuple[str, ...]:
    """Return the weights to quantize: as in mlx-lm, those whose rows are whole groups.

    Raises GateFailed when there are none.
    """
    names = tuple(
        name
        for name, weight in fused.weights.items()
        if weight.takes_bits and weight.shape[-1] % group_size == 0
    )
    if not names:
        found = f"no layer's input is a multiple of {group_size}"
        raise GateFailed(Fault("export.q_group_size", found, "use a smaller group size"))
    return names
