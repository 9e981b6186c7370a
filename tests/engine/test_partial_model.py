"""Activations in float32 come from the very numbers that are stored, whatever stores them."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_ft.engine.load import widen_scales
from mlx_ft.engine.partial_model import activations_in_float32

IDS = mx.array([[3, 1], [1, 15]])


def embedding(mode: str | None, dtype: mx.Dtype) -> nn.Module:
    mx.random.seed(0)
    model = nn.Sequential(nn.Embedding(16, 64))
    model.set_dtype(dtype)
    if mode is not None:
        nn.quantize(model, 32, 4, mode=mode)
    return model


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("mode", [None, "affine", "mxfp4"])
def test_looked_up_rows_are_exact(mode: str | None, dtype: mx.Dtype) -> None:
    model = embedding(mode, dtype)
    expected = widen_scales(embedding(mode, dtype))(IDS).astype(mx.float32)
    stored = model(IDS)
    with activations_in_float32(model):
        found = model(IDS)
    assert found.dtype == mx.float32 and mx.array_equal(found, expected).item()
    assert mx.array_equal(model(IDS), stored).item(), "outside, as before"
    rounded = not mx.array_equal(stored.astype(mx.float32), expected).item()
    assert rounded == (mode == "affine"), "an affine weight is finer than its scales' type"


def test_a_model_is_put_back_when_it_fails() -> None:
    model = embedding("affine", mx.bfloat16)
    inside = model.layers[0]
    with pytest.raises(RuntimeError), activations_in_float32(model):
        assert model.layers[0] is not inside
        raise RuntimeError
    assert model.layers[0] is inside
