"""Layer-by-layer views of the models to compare; only one layer of each is in memory.

Does: open a model folder, with an adapter or without, and a fused model that is in no folder.
Does not: run rows through a model (`layerwise.py`), or compare models (`verify_logits.py`).
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
    LayerwiseModel,
    fits_layers,
    is_in_layers,
    layer_prefix,
    layerwise_difference,
)
from mlx_ft.export.stored_model import StoredModel


class NotLayerwise(Exception):
    """A model that cannot run layer by layer; the text is the reason, as the end of a sentence."""


def layerwise_of_folder(folder: Path, adapter: Path | None = None) -> LayerwiseModel:
    """Return the layer-by-layer view of a model folder, with an adapter on it if one is given.

    Layers are expanded to float32 and dropped once rows went through them. Raises NotLayerwise.
    """
    model = StoredModel(folder).model
    if adapter is not None:
        attach_adapter(model, adapter)
        if not all(is_in_layers(name) for name, _ in tree_flatten(model.trainable_parameters())):
            raise NotLayerwise("the adapter reaches outside of the layers")
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

    return _layerwise(model, weights, Weight.rows, load, unload)


def _expand(layer: nn.Module, prefix: str, weights: Mapping[str, Weight]) -> None:
    """Expand a layer to float32: exactly the numbers that its quantized weights stand for.

    The type that their scales are stored in makes no difference.
    """
    plain = []
    for name, module in layer.named_modules():
        if "scales" in module:
            expanded = plain_layer(module)
            # An adapter's layer holds the layer that it adapts.
            weight = weights[f"{prefix}{name.removesuffix('.linear')}.weight"]
            expanded.weight = weight.whole(weight.rows)
            mx.eval(expanded.weight)
            plain.append((name, expanded))
    layer.update_modules(tree_unflatten(plain))
    layer.update(tree_map(widened, layer.parameters()))
    mx.eval(layer.parameters())


def layerwise_of_fused(fused: FusedModel) -> LayerwiseModel:
    """Return the layer-by-layer view of a fused model, rounded to 16 bits as it is written.

    Raises NotLayerwise.
    """
    _require_fit(fused.plain)
    for name in fused.weights:
        if _is_small(name):
            fused.load(name)
    return _layerwise(
        fused.plain,
        fused.weights,
        lambda weight, first, end: widened(weight.half_rows(first, end)),
        lambda index: fused.load(layer_prefix(index)),
        lambda index: fused.unload(layer_prefix(index)),
    )


def layerwise_fault(base: Path, adapter: Path, row: Sequence[int]) -> str | None:
    """Return why a base with this adapter cannot run layer by layer, or None when it can.

    That it can is proved on a row of ids.
    """
    try:
        layerwise_of_folder(base, adapter)
        return layerwise_difference(layerwise_of_folder(base), layerwise_of_folder(base), row)
    except NotLayerwise as unfit:
        return str(unfit)


def _layerwise(
    model: nn.Module,
    weights: Mapping[str, Weight],
    rows: Callable[[Weight, int, int], mx.array],
    load: Callable[[int], None],
    unload: Callable[[int], None],
) -> LayerwiseModel:
    embedding = weights[f"{EMBEDDING}.weight"]
    head = weights.get(f"{HEAD}.weight", embedding)
    bias = weights.get(f"{HEAD}.bias")

    def chosen(tokens: Sequence[int]) -> mx.array:
        return mx.concatenate([rows(embedding, token, token + 1) for token in tokens])

    def head_bias(first: int, end: int) -> mx.array:
        assert bias is not None
        return rows(bias, 0, 1)[0, first:end]

    return LayerwiseModel(
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
        raise NotLayerwise(f"{name} is not built as embedding, layers, norm")


def _is_small(name: str) -> bool:
    """Return whether a weight is outside of the layers, the embedding and the head."""
    return not is_in_layers(name) and not name.startswith((f"{EMBEDDING}.", f"{HEAD}."))


def _hold_outside(model: nn.Module) -> None:
    """Expand the few weights outside of the layers to float32."""
    small = [(name, widened(a)) for name, a in tree_flatten(model.parameters()) if _is_small(name)]
    model.load_weights(small, strict=False)


def _kept_dtype(model: nn.Module) -> str:
    """Return the 16-bit type that keeps the range of a model's own numbers."""
    kinds = {array.dtype for _, array in tree_flatten(model.parameters())}
    return next((name for name, dtype in DTYPES.items() if dtype in kinds), "bfloat16")
