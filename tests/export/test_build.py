"""What training learned is in the exported model, every step is measured, and nothing is faked."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import load_model as mlx_lm_load_model
from mlx_lm.utils import quantize_model

from mlx_ft.engine.adapters import attach_adapter
from mlx_ft.engine.load import load_weights
from mlx_ft.errors import GateFailed, ModelError, RunError
from mlx_ft.export import card
from mlx_ft.export.bit_widths import Bits
from mlx_ft.export.build import ExportInputs, export_model, needed_bytes
from mlx_ft.export.fuse import fuse, quantized_names
from mlx_ft.export.model_folder import require_empty, write_model_folder
from mlx_ft.export.verify_checks import check_bits, check_fused, check_fused_layers, layer_bits
from mlx_ft.export.verify_logits import Difference, differences, prompt_logits
from mlx_ft.recipe.export import fused_copy_needed_by
from mlx_ft.recipe.schema import EvalRecipe, ExportRecipe
from mlx_ft.system.console import Console
from tests.support.exports import PROMPTS, export_inputs, trained_adapter
from tests.support.models import (
    TINY_CONFIGS,
    stored_arrays,
    write_random_weights,
    write_stored,
    write_tiny_model,
)
from tests.support.slow import fast_first

ASKED = [[14, 15, 16, 17]]


@pytest.fixture(scope="module", params=fast_first([("llama", 4), ("qwen3", None), ("llama", 8)]))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, bits = request.param
    folder = tmp_path_factory.mktemp(f"base-{model_type}-{bits}")
    return write_tiny_model(folder, model_type, bits=bits)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a strong effect, as after a real training."""
    folder = tmp_path_factory.mktemp("adapter")
    return trained_adapter(base, "lora", folder, lambda name, array, noise: 0.3 * noise)


@pytest.fixture
def inputs(base: Path, adapter: Path, tmp_path: Path) -> ExportInputs:
    return export_inputs(base, adapter, tmp_path / "export", prompts=ASKED)


def rounding(bits: Literal[4, 5, 6, 8]) -> ExportRecipe:
    return ExportRecipe(q_bits=bits, q_group_size=32, q_method="round")


def logits_of(folder: Path, adapter: Path | None = None) -> list[np.ndarray]:
    model, _, _ = load_weights(folder)
    if adapter is not None:
        attach_adapter(model, adapter)
    return prompt_logits(model, PROMPTS)


def divergence(reference: list[np.ndarray], other: list[np.ndarray]) -> float:
    pair = ("one", "other")
    return differences({"one": reference, "other": other}, [pair])[pair].divergence


def test_the_export_holds_what_the_adapter_learned(inputs: ExportInputs) -> None:
    info = export_model(inputs, Console(io.StringIO()))
    assert all(check["ok"] for check in info["checks"]) and len(info["checks"]) == 6
    fused, small = inputs.folder / "fused-f16", inputs.folder / "q5"

    trained, base = logits_of(inputs.base, inputs.adapter), logits_of(inputs.base)
    assert divergence(base, trained) > 0.05, "the adapter must matter for this test to"
    assert divergence(trained, logits_of(fused)) < 1e-4
    assert divergence(trained, logits_of(small)) < divergence(base, trained) / 4

    dtypes = {array.dtype for array in stored_arrays(fused / "model.safetensors").values()}
    assert dtypes == {mx.float16}
    assert set(layer_bits(small).values()) == {5}
    assert "quantization" not in json.loads((fused / "config.json").read_text())
    for folder in (fused, small):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (inputs.base / name).read_bytes()


def test_a_gguf_is_written_where_the_recipe_asks_for_one(inputs: ExportInputs) -> None:
    info = export_model(inputs, Console(io.StringIO()))
    assert info["gguf"] is None and not list(inputs.folder.glob("*.gguf"))
    asked = replace(
        inputs,
        folder=inputs.folder / "asked",
        recipe=ExportRecipe(gguf="q8_0"),
        fused_for=("export.gguf",),
    )
    asked.folder.mkdir()
    info = export_model(asked, Console(io.StringIO()))
    size = (asked.folder / "tiny.gguf").stat().st_size
    assert info["gguf"] == {"path": "tiny.gguf", "bytes": size, "kind": "q8_0"}
    assert info["fused"] is None and not (asked.folder / "fused-f16").exists()


def test_the_16_bit_copy_is_written_only_for_somebody(inputs: ExportInputs, tmp_path: Path) -> None:
    """And the quantized model is the same, bit for bit, with or without it."""
    bare = replace(inputs, folder=tmp_path / "bare", fused_for=())
    bare.folder.mkdir()
    for each in (inputs, bare):
        info = export_model(each, Console(io.StringIO()))
        assert all(check["ok"] for check in info["checks"])
        assert (info["fused"] is None) == (each is bare)
    assert sorted(path.name for path in bare.folder.iterdir()) == ["q5", "survival.json"]
    one, other = (
        stored_arrays(each.folder / "q5" / "model.safetensors") for each in (inputs, bare)
    )
    assert one.keys() == other.keys()
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)


def test_who_needs_the_16_bit_copy() -> None:
    export, asked = ExportRecipe(keep_fused=False), EvalRecipe(suites=["suite.yaml"])
    without = EvalRecipe(suites=["suite.yaml"], columns=["base", "quantized"])
    assert fused_copy_needed_by(export, without) == fused_copy_needed_by(export, EvalRecipe()) == ()
    assert fused_copy_needed_by(export, asked) == ("the fused column",)
    both = ExportRecipe(gguf="f16")
    assert fused_copy_needed_by(both, without) == ("export.keep_fused", "export.gguf")


def test_gptq_keeps_more_than_rounding(inputs: ExportInputs, tmp_path: Path) -> None:
    rounding = replace(
        inputs, folder=tmp_path / "round", recipe=ExportRecipe(q_group_size=32, q_method="round")
    )
    rounding.folder.mkdir()
    for each in (inputs, rounding):
        info = export_model(each, Console(io.StringIO()))
        assert all(check["ok"] for check in info["checks"])
        assert info["quantized"]["method"] == each.recipe.q_method
        assert bool(info["quantized"]["gptq_layers"]) == (each.recipe.q_method == "gptq")
    fused, ours, plain = (
        logits_of(folder)
        for folder in (inputs.folder / "fused-f16", inputs.folder / "q5", rounding.folder / "q5")
    )
    assert divergence(fused, ours) < 0.8 * divergence(fused, plain)
    sizes = {
        (f / "q5" / "model.safetensors").stat().st_size for f in (inputs.folder, rounding.folder)
    }
    assert len(sizes) == 1, "the same format, byte for byte as big"


def test_mlx_lm_loads_both_folders_as_they_are(inputs: ExportInputs) -> None:
    export_model(inputs, Console(io.StringIO()))
    for name in ("fused-f16", "q5"):
        model, tokenizer = mlx_lm.load(str(inputs.folder / name))
        assert tokenizer.has_chat_template
        assert model(mx.array([PROMPTS[0]])).shape == (1, 6, 320)


def test_models_that_stay_in_16_bits_are_compared_and_rounded_in_float32_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the checks measure weights, and not what 16 bits lose on the way."""
    base = write_stored(tmp_path / "base", "qwen3", mx.bfloat16, 4)
    adapter = trained_adapter(base, "dora", tmp_path / "adapter")
    widened = export_inputs(base, adapter, tmp_path / "widened", prompts=ASKED)
    expected = export_model(widened, Console(io.StringIO()))
    stored = replace(widened, folder=tmp_path / "stored")
    stored.folder.mkdir()
    for module in ("mlx_ft.engine.device", "mlx_ft.engine.load", "mlx_ft.export.fuse"):
        monkeypatch.setattr(f"{module}.on_cpu", lambda: False)
    found = export_model(stored, Console(io.StringIO()))
    assert found["checks"] == expected["checks"]
    one, other = (stored_arrays(each.folder / "q5/model.safetensors") for each in (widened, stored))
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)


def test_exporting_twice_gives_the_same_weights(inputs: ExportInputs, tmp_path: Path) -> None:
    export_model(inputs, Console(io.StringIO()))
    again = replace(inputs, folder=tmp_path / "again")
    again.folder.mkdir()
    export_model(again, Console(io.StringIO()))
    for name in ("fused-f16", "q5"):
        one, other = (
            stored_arrays(f / name / "model.safetensors") for f in (inputs.folder, again.folder)
        )
        assert one.keys() == other.keys()
        assert all(mx.array_equal(one[key], other[key]).item() for key in one)


def test_an_adapter_of_another_model_is_refused(inputs: ExportInputs, tmp_path: Path) -> None:
    """mlx-lm loads an adapter that lacks tensors, and the layers stay silently as they were."""
    torn = tmp_path / "torn"
    torn.mkdir()
    weights = stored_arrays(inputs.adapter / "adapters.safetensors")
    missing = sorted(weights)[0]
    kept = {name: array for name, array in weights.items() if name != missing}
    mx.save_safetensors(str(torn / "adapters.safetensors"), kept)
    (torn / "adapter_config.json").write_text((inputs.adapter / "adapter_config.json").read_text())
    mlx_lm.load(str(inputs.base), adapter_path=str(torn))
    with pytest.raises(ModelError, match=missing):
        fuse(inputs.base, torn, "float16")


def test_a_model_without_the_adapter_does_not_pass_as_fused(inputs: ExportInputs) -> None:
    logits = {"adapter": logits_of(inputs.base, inputs.adapter), "fused": logits_of(inputs.base)}
    apart = differences(logits, [("adapter", "fused")])["adapter", "fused"]
    assert not check_fused(apart, apart, mx.float16).ok
    assert not check_fused_layers([], inputs.adapted_modules).ok
    assert not check_fused_layers(inputs.adapted_modules[1:], inputs.adapted_modules).ok
    assert check_fused_layers(inputs.adapted_modules, inputs.adapted_modules).ok


# Largest logit difference and nats from base + adapter, as measured with SmolLM2-135M in float32.
LEARNED = Difference(2.2e-2, 2.7e-3, 0.05)
FUSED_IN = {"float16": Difference(2.7e-4, 2.5e-7, 0.0), "bfloat16": Difference(3.5e-3, 5e-5, 0.01)}


@pytest.mark.parametrize("dtype", FUSED_IN)
def test_a_fault_smaller_than_any_logit_limit_is_judged_in_nats(dtype: str) -> None:
    """A weak adapter of a real model: a tenth of its scale moves no logit by 2 %."""
    kind = {"float16": mx.float16, "bfloat16": mx.bfloat16}[dtype]
    assert check_fused(FUSED_IN[dtype], LEARNED, kind).ok
    assert not check_fused(LEARNED, LEARNED, kind).ok, "left out"
    for wrong in (Difference(2.2e-3, 2.8e-5, 0.0), Difference(4.4e-3, 4.9e-5, 0.0)):
        assert check_fused(wrong, LEARNED, mx.float16).ok is False, "a tenth; one layer"
    nan = float("nan")
    assert not check_fused(Difference(0.0, nan, 0.0), LEARNED, kind).ok
    assert not check_fused(Difference(nan, 0.0, 0.0), LEARNED, kind).ok
    assert not check_fused(LEARNED, Difference(nan, nan, 0.0), kind).ok


def test_four_bits_do_not_pass_as_five(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "four", "llama", bits=4)
    modules = tuple(layer_bits(folder))
    assert check_bits(folder, modules, Bits(4)).ok
    assert not check_bits(folder, modules, Bits(5)).ok
    assert not check_bits(folder, (*modules, "model.layers.9.mlp.up_proj"), Bits(4)).ok


def test_quantizing_what_is_quantized_changes_nothing_in_mlx_lm(tmp_path: Path) -> None:
    """Why the export dequantizes first and reads the bits back: mlx-lm skips such layers."""
    folder = write_tiny_model(tmp_path / "four", "llama", bits=4)
    model, config = mlx_lm_load_model(folder)
    model, _ = quantize_model(model, config, 32, 5)
    bits = {m.bits for _, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)}
    assert bits == {4}


def test_a_group_size_that_fits_no_layer_is_said(tmp_path: Path) -> None:
    config = TINY_CONFIGS["llama"] | {"hidden_size": 64, "intermediate_size": 96}
    fused = fuse(write_random_weights(tmp_path, config), None, "float16")
    with pytest.raises(GateFailed, match="128"):
        quantized_names(fused, 128)


def scaled_adapter(adapter: Path, factor: float, folder: Path) -> Path:
    folder.mkdir()
    weights = stored_arrays(adapter / "adapters.safetensors")
    scaled = {name: array * factor for name, array in weights.items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), scaled)
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return folder


def test_layers_that_stay_16_bit_are_told_everywhere(tmp_path: Path) -> None:
    """Only what reads the 128 numbers within makes whole groups of 128: 2 layers of 15."""
    base = write_tiny_model(tmp_path / "base", "llama", bits=None)
    adapter = trained_adapter(base, "lora", tmp_path / "adapter")
    inputs = export_inputs(base, adapter, tmp_path / "export", q_group_size=128, min_survival=None)
    said = io.StringIO()
    info = export_model(inputs, Console(said))
    assert "13 of 15 layers stay 16-bit" in said.getvalue()
    (check,) = [each for each in info["checks"] if "bits of every" in each["check"]]
    assert check["check"] == "bits of every quantized layer are 5"
    assert check["measured"] == "2 of 2 layers; 13 others stay 16-bit"
    assert "13 of 15 layers stay 16-bit" in (inputs.folder / "q5" / "README.md").read_text()
    assert any("13 layers stay 16-bit" in warning for warning in card.export_warnings(info, None))


@pytest.mark.parametrize("fused_for", [("export.keep_fused",), ()])
def test_a_model_that_leaves_float16_is_kept_in_bfloat16(
    inputs: ExportInputs, tmp_path: Path, fused_for: tuple[str, ...]
) -> None:
    big = replace(
        inputs, adapter=scaled_adapter(inputs.adapter, 1000, tmp_path / "big"), fused_for=fused_for
    )
    said = io.StringIO()
    info = export_model(replace(big, recipe=rounding(5)), Console(said))
    assert info["dtype"] == "bfloat16" and "65,504" in info["dtype_reason"]
    assert "the whole model is kept in bfloat16" in said.getvalue()
    assert all(check["ok"] for check in info["checks"])
    files = list(inputs.folder.glob("*/model.safetensors"))
    assert len(files) == 1 + len(fused_for)
    for file in files:
        for array in stored_arrays(file).values():
            assert array.dtype in (mx.bfloat16, mx.uint32)
            assert bool(mx.isfinite(array.astype(mx.float32)).all().item())


def test_numbers_beyond_every_type_are_not_written(inputs: ExportInputs, tmp_path: Path) -> None:
    wild = replace(inputs, adapter=scaled_adapter(inputs.adapter, 1e19, tmp_path / "wild"))
    with pytest.raises(GateFailed, match="learning_rate"):
        export_model(wild, Console(io.StringIO()))
    assert not list(inputs.folder.rglob("*.safetensors")) and not list(
        inputs.folder.rglob("config.json")
    )


def test_never_into_a_folder_that_has_something(tmp_path: Path) -> None:
    """mlx-lm merges every shard it finds: a stale one would override fresh weights."""
    require_empty(tmp_path / "new")
    (tmp_path / "used").mkdir()
    require_empty(tmp_path / "used")
    (tmp_path / "used" / "model-00002-of-00002.safetensors").touch()
    with pytest.raises(RunError, match="not empty"):
        write_model_folder(tmp_path / "used", tmp_path, nn.Linear(2, 2), {}, "")


def test_a_sharded_folder_is_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_ft.export import safetensors_writer

    source = write_tiny_model(tmp_path / "source", bits=None)
    model, config = mlx_lm_load_model(source)
    monkeypatch.setattr(safetensors_writer, "MAX_SHARD_BYTES", 40_000)
    write_model_folder(tmp_path / "sharded", source, model, config, "card")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    one, other = logits_of(source), logits_of(tmp_path / "sharded")
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_disk_is_asked_for_both_copies() -> None:
    recipe = ExportRecipe()
    assert needed_bytes(1_000_000, recipe, (), 1_000_000) == 2_100_000
    kept = ("export.keep_fused",)
    assert needed_bytes(1_000_000, recipe, kept) > 1_000_000 * (2 + 5 / 8)
    assert needed_bytes(1_000_000, recipe, kept) > needed_bytes(1_000_000, recipe, ()) + 2_000_000
    both = needed_bytes(1_000_000, ExportRecipe(gguf="f16"), kept)
    assert both > needed_bytes(1_000_000, recipe, kept) + 2_000_000


@pytest.mark.slow
def test_the_bench_writes_the_same_weights_unverified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the stage apart, and so would no longer run when the stage changes."""
    from tests.benchmarks import export as bench

    monkeypatch.setattr(bench, "LLAMA_3B", TINY_CONFIGS["llama"])
    bench.write_model(tmp_path / "model", layers=2)
    folders = [tmp_path / "verified", tmp_path / "unverified"]
    for folder in folders:
        folder.mkdir()
        bench.ours(tmp_path / "model", folder, "round", verified=folder == folders[0])
    for name in ("fused-f16", "q5"):
        one, other = ((f / "ours" / name / "model.safetensors").read_bytes() for f in folders)
        assert one == other
    assert not (folders[1] / "ours" / "survival.json").exists()
