"""An adapter trained on a quantized base is fused into the 16-bit original, if they fit."""

import io
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ft.errors import ModelError
from mlx_ft.export.build import export_model
from mlx_ft.export.original import require_same_shapes
from mlx_ft.system.console import Console
from tests.support.exports import base_of, inputs_of, plainly_fused, trained_adapter
from tests.support.models import TINY_CONFIGS, write_random_weights


@pytest.mark.parametrize("method", ["round", "gptq"])
def test_the_adapter_goes_into_the_original(tmp_path: Path, method: str) -> None:
    base = base_of("llama", 4, mx.float16, tmp_path)
    original = tmp_path / "source"
    adapter = trained_adapter(base, "lora", tmp_path / "adapter")
    inputs = replace(
        inputs_of(base, adapter, tmp_path / "export", q_method=method), original=original
    )
    said = io.StringIO()
    info = export_model(inputs, Console(said))
    assert all(check["ok"] for check in info["checks"]), info["checks"]
    ours = mx.load(str(inputs.folder / "fused-f16" / "model.safetensors"))
    assert isinstance(ours, dict)
    name = "model.layers.1.mlp.up_proj.weight"
    wanted, other = (
        dict(plainly_fused(folder, adapter, mx.float16).named_modules())[name[:-7]].weight
        for folder in (original, base)
    )
    assert mx.array_equal(ours[name], wanted).item()
    assert not mx.array_equal(ours[name], other).item()
    ways = info["original"]["from_trained"]
    assert ways["into the trained base"]["fused"]["divergence"] < 1e-4
    assert ways["into the original"]["fused"]["divergence"] > 1e-3, "4 bits moved the base"
    for way in ways.values():
        assert way["quantized"]["divergence"] > way["fused"]["divergence"] / 2
    assert "fused into the original" in said.getvalue()


def test_another_model_is_refused_with_what_differs(tmp_path: Path) -> None:
    base = base_of("llama", 4, mx.float16, tmp_path)
    wider = TINY_CONFIGS["llama"] | {"intermediate_size": 256, "num_hidden_layers": 3}
    other = write_random_weights(tmp_path / "other", wider)
    with pytest.raises(ModelError) as raised:
        require_same_shapes(base, other)
    text = str(raised.value)
    assert "mlp.down_proj.weight: shape (64, 256), the trained model has shape (64, 128)" in text
    assert "more tensors differ" in text
    require_same_shapes(base, tmp_path / "source")
