"""The models that the export compares, each as a lane: one layer of it in memory at a time.

Does: make a lane of a folder, with an adapter or without, and of a fused model that is in no
folder. Does not: run rows through it (`layerwise.py`), or compare (`verify_checks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_ft.engine.adapters import attach_adapter
from mlx_ft.export.fuse import DTYPES, FusedModel, Weight, fuse, plain_layer, widened
from mlx_ft.export.layerwise import (
    EMBEDDING,
    HEAD,
    Lane,
    fits_layers,
    is_in_layers,
    layer_prefix,
    why_not_by_layers,
)
from mlx_ft.export.stored_model import StoredModel


class Unfit(Exception):
    """Why a model cannot be a lane, as the end of a sentence."""


def lane_of_folder(folder: Path, adapter: Path | None = None) -> Lane:
    """Return a model folder as a lane, with an adapter on it if one is given.

    Its layers are expanded to float32, and are gone once rows went through them. Raises Unfit.
    """
    model = StoredModel(folder).model
    if adapter is not None:
        attach_adapter(model, adapter)
        if not all(is_in_layers(name) for name, _ in tree_flatten(model.trainable_parameters())):
            raise Unfit("the adapter reaches outside of the layers")
    _require_fit(model)
    dtype = _kept_dtype(model)
    weights = fuse(folder, None, dtype).weights
    _hold_outside(model)

    def load(index: int) -> None:
        _expand(model.model.layers[index], layer_prefix(index), weights)

    def unload(index: int) -> None:
        layer = model.model.layers[index]
        layer.update(tree_map(lambda array: mx.zeros((0,), array.dtype), layer.parameters()))
        mx.clear_cache()

    return _lane(model, weights, Weight.rows, load, unload)


def _expand(layer: nn.Module, prefix: str, weights: Mapping[str, Weight]) -> None:
    """Have a layer in float32: the very numbers that quantized weights stand for, whatever type
    their scales are stored in.
    """
    plain = []
    for name, module in layer.named_modules():
        if "scales" in module:
            expanded = plain_layer(module)
            # An adapter's layer holds the one that it is put on.
            weight = weights[f"{prefix}{name.removesuffix('.linear')}.weight"]
            expanded.weight = weight.whole(weight.rows)
            mx.eval(expanded.weight)
            plain.append((name, expanded))
    layer.update_modules(tree_unflatten(plain))
    layer.update(tree_map(widened, layer.parameters()))
    mx.eval(layer.parameters())


def lane_of_fused(fused: FusedModel) -> Lane:
    """Return a fused model as a lane, in 16 bits as it is or would be written. Raises Unfit."""
    _require_fit(fused.plain)
    for name in fused.weights:
        if _is_small(name):
            fused.load(name)
    return _lane(
        fused.plain,
        fused.weights,
        lambda weight, first, end: widened(weight.half_rows(first, end)),
        lambda index: fused.load(layer_prefix(index)),
        lambda index: fused.unload(layer_prefix(index)),
    )


def layers_fault(base: Path, adapter: Path, row: Sequence[int]) -> str | None:
    """Return why models with this base and adapter cannot be taken layer by layer, or None where
    that is proved on a row of ids.
    """
    try:
        lane_of_folder(base, adapter)
        return why_not_by_layers(lane_of_folder(base), lane_of_folder(base), row)
    except Unfit as unfit:
        return str(unfit)


def _lane(
    model: nn.Module,
    weights: Mapping[str, Weight],
    rows: Callable[[Weight, int, int], mx.array],
    load: Callable[[int], None],
    unload: Callable[[int], None],
) -> Lane:
    embedding = weights[f"{EMBEDDING}.weight"]
    head = weights.get(f"{HEAD}.weight", embedding)
    bias = weights.get(f"{HEAD}.bias")

    def chosen(tokens: Sequence[int]) -> mx.array:
        return mx.concatenate([rows(embedding, token, token + 1) for token in tokens])

    def head_bias(first: int, end: int) -> mx.array:
        assert bias is not None
        return rows(bias, 0, 1)[0, first:end]

    return Lane(
        model,
        head.shape[0],
        chosen,
        lambda first, end: rows(head, first, end),
        head_bias if bias is not None else None,
        load,
        unload,
    )


def _require_fit(model: nn.Module) -> None:
    if not fits_layers(model):
        name = type(model).__module__.rsplit(".", 1)[-1]
        raise Unfit(f"{name} is not built as embedding, layers, norm")


def _is_small(name: str) -> bool:
    """Say whether a weight is in no layer, nor in the embedding or the head."""
    return not is_in_layers(name) and not name.startswith((f"{EMBEDDING}.", f"{HEAD}."))


def _hold_outside(model: nn.Module) -> None:
    """Have the few weights outside of the layers in float32."""
    small = [(name, widened(a)) for name, a in tree_flatten(model.parameters()) if _is_small(name)]
    model.load_weights(small, strict=False)


def _kept_dtype(model: nn.Module) -> str:
    """Return the 16-bit type in which a model's own numbers keep their range."""
    kinds = {array.dtype for _, array in tree_flatten(model.parameters())}
    return next((name for name, dtype in DTYPES.items() if dtype in kinds), "bfloat16")
