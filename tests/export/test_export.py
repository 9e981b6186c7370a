"""What training learned is in the exported model, every step is measured, and nothing is faked."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as mlx_lm_load_model
from mlx_lm.utils import quantize_model

from mlx_ft.console import Console
from mlx_ft.errors import GateFailed, ModelError, RunError
from mlx_ft.export.folders import require_empty, shard_names, write_model_folder
from mlx_ft.export.fuse import fuse, quantize
from mlx_ft.export.stage import ExportJob, export_model, needed_bytes
from mlx_ft.export.verify import (
    check_bits,
    check_fused,
    check_fused_layers,
    layer_bits,
    mean_divergence,
    prompt_logits,
    top_token_flips,
)
from mlx_ft.inference import attach_adapter, load_weights
from mlx_ft.recipe import DataRecipe, ExportRecipe, LoraParameters, Recipe, TrainRecipe
from mlx_ft.train.adapters import adapter_config, put_adapter, save_adapter
from tests.tiny import write_tiny_model

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]


@pytest.fixture(scope="module", params=[("llama", 4), ("qwen3", None), ("llama", 8)])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, bits = request.param
    folder = tmp_path_factory.mktemp(f"base-{model_type}-{bits}")
    return write_tiny_model(folder, model_type, bits=bits)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a strong effect, as after a real training."""
    train = TrainRecipe(num_layers=1, lora_parameters=LoraParameters(rank=4, scale=4.0))
    recipe = Recipe(name="tiny", model="tiny", data=DataRecipe(path="."), train=train)
    model, _, _ = load_weights(base)
    config = adapter_config(recipe, 1)
    put_adapter(model, train, config)
    mx.random.seed(3)
    weights = [
        (name, mx.random.normal(array.shape) * 0.3)
        for name, array in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(weights, strict=False)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, config, folder)
    return folder


@pytest.fixture
def job(base: Path, adapter: Path, tmp_path: Path) -> Iterator[ExportJob]:
    names = mx.load(str(adapter / "adapters.safetensors"))
    folder = tmp_path / "export"
    folder.mkdir()
    yield ExportJob(
        name="tiny",
        base=base,
        adapter=adapter,
        folder=folder,
        adapted_modules=tuple(sorted({name.rsplit(".", 1)[0] for name in names})),
        parameters=100_000,
        recipe=ExportRecipe(q_group_size=32),
        prompts=PROMPTS,
        calibration=PROMPTS,
        card=lambda what: f"# tiny: {what}\n",
    )


def logits_of(folder: Path, adapter: Path | None = None) -> list[np.ndarray]:
    model, _, _ = load_weights(folder)
    if adapter is not None:
        attach_adapter(model, adapter)
    return prompt_logits(model, PROMPTS)


def test_the_export_holds_what_the_adapter_learned(job: ExportJob) -> None:
    info = export_model(job, Console(io.StringIO()))
    assert all(check["ok"] for check in info["checks"]) and len(info["checks"]) == 6
    fused, small = job.folder / "fused-f16", job.folder / "q5"

    trained, base = logits_of(job.base, job.adapter), logits_of(job.base)
    assert mean_divergence(base, trained) > 0.05, "the adapter must matter for this test to"
    assert mean_divergence(trained, logits_of(fused)) < 1e-4
    assert mean_divergence(trained, logits_of(small)) < mean_divergence(base, trained) / 4

    dtypes = {array.dtype for array in mx.load(str(fused / "model.safetensors")).values()}
    assert dtypes == {mx.float16}
    assert set(layer_bits(small).values()) == {5}
    assert "quantization" not in json.loads((fused / "config.json").read_text())
    for folder in (fused, small):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (job.base / name).read_bytes()


def test_a_gguf_is_written_where_the_recipe_asks_for_one(job: ExportJob) -> None:
    info = export_model(job, Console(io.StringIO()))
    assert info["gguf"] is None and not list(job.folder.glob("*.gguf"))
    asked = replace(job, folder=job.folder / "asked", recipe=ExportRecipe(gguf="q8_0"))
    asked.folder.mkdir()
    info = export_model(asked, Console(io.StringIO()))
    size = (asked.folder / "tiny.gguf").stat().st_size
    assert info["gguf"] == {"path": "tiny.gguf", "bytes": size, "kind": "q8_0"}


def test_gptq_keeps_more_than_rounding(job: ExportJob, tmp_path: Path) -> None:
    rounding = replace(
        job, folder=tmp_path / "round", recipe=ExportRecipe(q_group_size=32, q_method="round")
    )
    rounding.folder.mkdir()
    for each in (job, rounding):
        info = export_model(each, Console(io.StringIO()))
        assert all(check["ok"] for check in info["checks"])
        assert info["quantized"]["method"] == each.recipe.q_method
        assert bool(info["quantized"]["gptq_layers"]) == (each.recipe.q_method == "gptq")
    fused, ours, plain = (
        logits_of(folder)
        for folder in (job.folder / "fused-f16", job.folder / "q5", rounding.folder / "q5")
    )
    assert mean_divergence(fused, ours) < 0.8 * mean_divergence(fused, plain)
    sizes = {(f / "q5" / "model.safetensors").stat().st_size for f in (job.folder, rounding.folder)}
    assert len(sizes) == 1, "the same format, byte for byte as big"


def test_mlx_lm_loads_both_folders_as_they_are(job: ExportJob) -> None:
    export_model(job, Console(io.StringIO()))
    for name in ("fused-f16", "q5"):
        model, tokenizer = mlx_lm.load(str(job.folder / name))
        assert tokenizer.has_chat_template
        assert model(mx.array([PROMPTS[0]])).shape == (1, 6, 320)


def test_exporting_twice_gives_the_same_weights(job: ExportJob, tmp_path: Path) -> None:
    export_model(job, Console(io.StringIO()))
    again = replace(job, folder=tmp_path / "again")
    again.folder.mkdir()
    export_model(again, Console(io.StringIO()))
    for name in ("fused-f16", "q5"):
        one, other = (
            mx.load(str(f / name / "model.safetensors")) for f in (job.folder, again.folder)
        )
        assert one.keys() == other.keys()
        assert all(mx.array_equal(one[key], other[key]).item() for key in one)


def test_an_adapter_of_another_model_is_refused(job: ExportJob, tmp_path: Path) -> None:
    """mlx-lm loads an adapter that lacks tensors, and the layers stay silently as they were."""
    torn = tmp_path / "torn"
    torn.mkdir()
    weights = mx.load(str(job.adapter / "adapters.safetensors"))
    missing = sorted(weights)[0]
    kept = {name: array for name, array in weights.items() if name != missing}
    mx.save_safetensors(str(torn / "adapters.safetensors"), kept)
    (torn / "adapter_config.json").write_text((job.adapter / "adapter_config.json").read_text())
    mlx_lm.load(str(job.base), adapter_path=str(torn))
    with pytest.raises(ModelError, match=missing):
        fuse(job.base, torn, "float16")


def test_a_model_without_the_adapter_does_not_pass_as_fused(job: ExportJob) -> None:
    check = check_fused(logits_of(job.base, job.adapter), logits_of(job.base))
    assert not check.ok
    assert not check_fused_layers([], job.adapted_modules).ok
    assert not check_fused_layers(job.adapted_modules[1:], job.adapted_modules).ok
    assert check_fused_layers(job.adapted_modules, job.adapted_modules).ok


def test_four_bits_do_not_pass_as_five(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "four", "llama", bits=4)
    modules = tuple(layer_bits(folder))
    assert check_bits(folder, modules, 4).ok
    assert not check_bits(folder, modules, 5).ok
    assert not check_bits(folder, (*modules, "model.layers.9.mlp.up_proj"), 4).ok


def test_quantizing_what_is_quantized_changes_nothing_in_mlx_lm(tmp_path: Path) -> None:
    """Why the export dequantizes first and reads the bits back: mlx-lm skips such layers."""
    folder = write_tiny_model(tmp_path / "four", "llama", bits=4)
    model, config = mlx_lm_load_model(folder)
    model, _ = quantize_model(model, config, 32, 5)
    bits = {m.bits for _, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)}
    assert bits == {4}
    model, config = mlx_lm_load_model(write_tiny_model(tmp_path / "plain", bits=None))
    model, described, modules = quantize(model, config, 5, 32)
    bits = {m.bits for _, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)}
    assert bits == {5} and described["quantization"]["bits"] == 5
    assert "model.embed_tokens" in modules


def test_a_group_size_that_fits_no_layer_is_said(tmp_path: Path) -> None:
    model, config = mlx_lm_load_model(write_tiny_model(tmp_path / "plain", bits=None))
    with pytest.raises(GateFailed, match="128"):
        quantize(model.model.layers[0].self_attn, config, 5, 128)


def test_float16_overflow_is_found_before_anything_is_written(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    big = tmp_path / "big"
    big.mkdir()
    weights = mx.load(str(adapter / "adapters.safetensors"))
    mx.save_safetensors(
        str(big / "adapters.safetensors"), {n: a * 1000 for n, a in weights.items()}
    )
    (big / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    with pytest.raises(GateFailed, match="bfloat16"):
        fuse(base, big, "float16")


def test_never_into_a_folder_that_has_something(tmp_path: Path) -> None:
    """mlx-lm merges every shard it finds: a stale one would override fresh weights."""
    require_empty(tmp_path / "new")
    (tmp_path / "used").mkdir()
    require_empty(tmp_path / "used")
    (tmp_path / "used" / "model-00002-of-00002.safetensors").touch()
    with pytest.raises(RunError, match="not empty"):
        write_model_folder(tmp_path / "used", tmp_path, nn.Linear(2, 2), {}, "")


@given(st.dictionaries(st.text(min_size=1), st.integers(1, 100), min_size=1), st.integers(1, 300))
def test_shards_hold_every_tensor_once_in_order(sizes: dict[str, int], limit: int) -> None:
    shards = shard_names(sizes, limit)
    assert [name for shard in shards for name in shard] == list(sizes)
    for shard in shards:
        assert len(shard) == 1 or sum(sizes[name] for name in shard) <= limit


def test_a_sharded_folder_is_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_ft.export import folders

    source = write_tiny_model(tmp_path / "source", bits=None)
    model, config = mlx_lm_load_model(source)
    monkeypatch.setattr(folders, "MAX_SHARD_BYTES", 40_000)
    write_model_folder(tmp_path / "sharded", source, model, config, "card")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    one, other = logits_of(source), logits_of(tmp_path / "sharded")
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_divergence_is_zero_of_itself_and_grows() -> None:
    generator = np.random.default_rng(0)
    logits = [generator.normal(size=(5, 40)).astype(np.float32)]
    near = [logits[0] + 0.01 * generator.normal(size=(5, 40)).astype(np.float32)]
    far = [generator.normal(size=(5, 40)).astype(np.float32)]
    assert mean_divergence(logits, logits) == 0.0
    assert 0 < mean_divergence(logits, near) < mean_divergence(logits, far)
    assert top_token_flips(logits, logits) == 0.0 < top_token_flips(logits, far)


def test_the_disk_is_asked_for_both_copies() -> None:
    recipe = ExportRecipe()
    assert needed_bytes(1_000_000, recipe) > 1_000_000 * (2 + 5 / 8)
    both = needed_bytes(1_000_000, ExportRecipe(gguf="f16"))
    assert both > needed_bytes(1_000_000, recipe) + 2_000_000
