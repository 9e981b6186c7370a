"""Whatever was trained, and whatever it was trained on, is fused equal to the adapter: streamed in
parts of a few rows, the same bits as plainly computed with the whole model.

The faults of mlx-lm 0.32.2 that this avoids are shown beside it.
"""

import io
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRASwitchLinear
from mlx_lm.utils import dequantize_model
from mlx_lm.utils import load_model as mlx_lm_load_model

from mlx_ft.engine.adapters import attach_adapter
from mlx_ft.engine.load import scalar
from mlx_ft.errors import ModelError
from mlx_ft.export import safetensors_writer
from mlx_ft.export.build import export_model
from mlx_ft.export.fuse import fuse
from mlx_ft.system.console import Console
from tests.support.exports import (
    KINDS,
    base_of,
    inputs_of,
    plainly_fused,
    trained_adapter,
)
from tests.support.models import TINY_CONFIGS, write_random_weights
from tests.support.slow import fast_first, fast_rows_first

CASES = [
    *(("llama", 4, mx.float16, kind) for kind in ("lora", "rslora", "embedding", "dora")),
    ("llama", 8, mx.bfloat16, "lora"),
    ("qwen3", 4, mx.bfloat16, "dora"),
    ("qwen3", 5, mx.float16, "lora"),
    ("qwen3", 3, mx.float16, "lora"),
    ("qwen2", 6, mx.float16, "lora"),
    *(("qwen3", None, mx.bfloat16, kind) for kind in KINDS),
    ("gemma3_text", None, mx.bfloat16, "lora"),
    *(("experts", bits, mx.float16, "lora") for bits in (4, None)),
]


@pytest.mark.parametrize(("model", "bits", "dtype", "kind"), fast_rows_first(CASES, 4))
@pytest.mark.parametrize("part_bytes", fast_first([1 << 12, safetensors_writer.PART_BYTES]))
def test_streamed_is_the_whole_model_computed_plainly(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    bits: int | None,
    dtype: mx.Dtype,
    kind: str,
    part_bytes: int,
) -> None:
    """In parts as large as here a tensor is one; in small ones a sum may round the other way."""
    monkeypatch.setattr(safetensors_writer, "PART_BYTES", part_bytes)
    base = base_of(model, bits, dtype, tmp_path)
    adapter = trained_adapter(base, kind, tmp_path / "adapter")
    inputs = inputs_of(base, adapter, tmp_path / "export")
    said = io.StringIO()
    info = export_model(inputs, Console(said))
    assert all(check["ok"] for check in info["checks"]), info["checks"]
    assert ("whole model is held" in said.getvalue()) == (kind == "embedding")
    whole = plainly_fused(base, adapter, mx.float16)
    rounded = plainly_fused(base, adapter, mx.float16)
    nn.quantize(rounded, 32, 8)
    for folder, expected in (("fused-f16", whole), ("q8", rounded)):
        ours = mx.load(str(inputs.folder / folder / "model.safetensors"))
        theirs = dict(tree_flatten(expected.parameters()))
        assert isinstance(ours, dict) and ours.keys() == theirs.keys()
        for name, array in theirs.items():
            assert ours[name].dtype == array.dtype, name
            if part_bytes == safetensors_writer.PART_BYTES == 32 << 20 or "layers" not in name:
                assert mx.array_equal(ours[name], array).item(), f"{folder} {name}"
            else:
                equal = np.array(ours[name] == array)
                assert equal.mean() > 0.98, f"{folder} {name}"


@pytest.mark.slow
def test_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly all of this model is its vocabulary; neither that nor all layers are ever there."""
    monkeypatch.setattr(safetensors_writer, "PART_BYTES", 1 << 18)
    monkeypatch.setattr("mlx_ft.export.verify_logits.LOGIT_BYTES", 1 << 18)
    peaks = []
    for words, layers in ((1 << 13, 8), (1 << 17, 24)):
        folder = tmp_path / str(words)
        config = TINY_CONFIGS["llama"] | {"vocab_size": words, "num_hidden_layers": layers}
        base = write_random_weights(folder, config)
        adapter = trained_adapter(base, "lora", folder / "adapter")
        for _ in range(2):  # what is made once and stays is not counted
            mx.clear_cache()
            before = mx.get_active_memory()
            inputs = inputs_of(base, adapter, folder / f"export{_}")
            info = export_model(inputs, Console(io.StringIO()))
        assert all(check["ok"] for check in info["checks"])
        peaks.append(info["peak_memory_bytes"] - before)
    model_bytes = (tmp_path / str(1 << 17) / "model.safetensors").stat().st_size
    assert peaks[1] < 1.5 * peaks[0] and peaks[1] < model_bytes / 2, (peaks, model_bytes)


def test_mlx_lm_rounds_the_sum_twice_and_we_once(tmp_path: Path) -> None:
    """On a bfloat16 base mlx-lm adds in bfloat16: a small delta is half lost before it is kept."""
    base = base_of("qwen3", None, mx.bfloat16, tmp_path)
    adapter = trained_adapter(base, "lora", tmp_path / "adapter")
    name = "model.layers.1.mlp.up_proj"
    exact = dict(plainly_fused(base, adapter, mx.float32).named_modules())[name].weight
    model, _ = mlx_lm_load_model(base)
    attach_adapter(model, adapter)
    theirs = dict(model.named_modules())[name].fuse().weight.astype(mx.float32)
    weight = fuse(base, adapter, "float16").weights[f"{name}.weight"]
    ours = weight.whole().astype(mx.float32)

    def error(weight: mx.array) -> float:
        return scalar(mx.abs(weight - exact).max())

    assert error(ours) < error(theirs) / 4


def test_dora_on_bfloat16_stays_16_bit(tmp_path: Path) -> None:
    """mlx-lm's fuse gives float32 layers there: a file of mixed types, and twice the size."""
    base = base_of("qwen3", None, mx.bfloat16, tmp_path)
    adapter = trained_adapter(base, "dora", tmp_path / "adapter")
    model, _ = mlx_lm_load_model(base)
    attach_adapter(model, adapter)
    layer = dict(model.named_modules())["model.layers.1.mlp.up_proj"]
    assert layer.fuse().weight.dtype == mx.float32
    fused = fuse(base, adapter, "bfloat16")
    assert {weight.whole().dtype for weight in fused.weights.values()} == {mx.bfloat16}


def test_experts_get_the_adapter_of_their_own(tmp_path: Path) -> None:
    base = base_of("experts", 4, mx.float16, tmp_path)
    adapter = trained_adapter(base, "lora", tmp_path / "adapter")
    model, _ = mlx_lm_load_model(base)
    attach_adapter(model, adapter)
    experts = [n for n, m in model.named_modules() if isinstance(m, LoRASwitchLinear)]
    assert len(experts) == 3
    fused = fuse(base, adapter, "float16")
    assert set(experts) < set(fused.fused_modules)
    for name in experts:  # rows of several experts at once, too
        weight = fused.weights[f"{name}.weight"]
        outputs = weight.shape[-2]
        cut = (outputs // 2, 3 * outputs // 2)
        one_by_one = [weight.rows(cut[0], outputs), weight.rows(outputs, cut[1])]
        assert mx.allclose(weight.rows(*cut), mx.concatenate(one_by_one), atol=1e-6).item()


class Latent(nn.Module):
    """The one kind of layer that mlx-lm leaves quantized when it drops `quantization`."""


def test_stacked_heads_are_dequantized_too(tmp_path: Path) -> None:
    """mlx-lm's dequantize_model passes QuantizedMultiLinear by, and the saved model cannot load."""
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

    from mlx_ft.export.fuse import plain_structure

    model = Latent()
    model.heads = MultiLinear(64, 32, 4)
    nn.quantize(model, 32, 4)
    assert isinstance(dequantize_model(model).heads, QuantizedMultiLinear)
    plain = plain_structure(model).heads
    assert type(plain) is MultiLinear and plain.weight.shape == (4, 32, 64)


def test_what_cannot_be_dequantized_is_said(tmp_path: Path) -> None:
    from mlx_ft.export.fuse import plain_structure

    class Strange(nn.QuantizedLinear):
        pass

    model = Latent()
    model.layer = Strange(64, 32, False, 32, 4)
    with pytest.raises(ModelError, match="Strange"):
        plain_structure(model)
