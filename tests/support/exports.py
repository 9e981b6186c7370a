"""Adapters whose every tensor matters, and exports of them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import dequantize_model
from mlx_lm.utils import load_model as mlx_lm_load_model

from mlx_ft.engine.adapters import attach_adapter
from mlx_ft.engine.load import load_weights
from mlx_ft.export.build import ExportInputs
from mlx_ft.export.survival.audit import Passages
from mlx_ft.recipe.schema import DataRecipe, ExportRecipe, Recipe, TrainRecipe
from mlx_ft.train.adapters import adapter_config, put_adapter, save_adapter
from tests.support.models import TINY_CONFIGS, write_random_weights

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_parameters": {"rank": 4, "scale": 4.0}},
    "rslora": {"lora_parameters": {"rank": 4, "alpha": 8.0, "rslora": True}},
    "embedding": {
        "lora_parameters": {
            "rank": 4,
            "scale": 4.0,
            "keys": ["self_attn.q_proj", "model.embed_tokens"],
        }
    },
    "dora": {"fine_tune_type": "dora", "lora_parameters": {"rank": 4, "scale": 4.0}},
    "full": {"fine_tune_type": "full"},
}
# name, array as training begins, noise of its shape -> array as training ended
Move = Callable[[str, mx.array, mx.array], mx.array]


def a_little(name: str, array: mx.array, noise: mx.array) -> mx.array:
    """Each tensor away from where it began, the large ones of DoRA and full training by a share."""
    return array * 1.05 if "lora" not in name else array + 0.2 * noise


def trained_adapter(base: Path, kind: str, folder: Path, move: Move = a_little) -> Path:
    """Write an adapter of a kind on the uppermost layer of a base; return its folder."""
    train = TrainRecipe.model_validate({"num_layers": 1, **KINDS[kind]})
    recipe = Recipe(name="tiny", model="tiny", data=DataRecipe(path="."), train=train)
    model, _, _ = load_weights(base)
    config = adapter_config(recipe, 1)
    put_adapter(model, train, config)
    mx.random.seed(3)
    moved = [
        (name, move(name, array, mx.random.normal(array.shape)))
        for name, array in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(moved, strict=False)
    save_adapter(model, config, folder)
    return folder


def export_inputs(
    base: Path,
    adapter: Path,
    folder: Path,
    *,
    held_out: Sequence[Sequence[int]] = PROMPTS,
    trained: Sequence[Sequence[int]] | None = None,
    prompts: Sequence[Sequence[int]] = (),
    **recipe: Any,
) -> ExportInputs:
    """Return the inputs of an export into a new folder, in groups of 32 unless `recipe` has others.

    held_out, trained, prompts: see `Passages`; held-out rows also calibrate.
    """
    names = mx.load(str(adapter / "adapters.safetensors"))
    assert isinstance(names, dict)
    folder.mkdir()
    return ExportInputs(
        name="tiny",
        base=base,
        adapter=adapter,
        folder=folder,
        adapted_modules=tuple(sorted({name.rsplit(".", 1)[0] for name in names})),
        parameters=100_000,
        recipe=ExportRecipe.model_validate({"q_group_size": 32, **recipe}),
        passages=Passages(
            held_out=held_out,
            trained=trained or [range(len(row) - 1) for row in held_out],
            prompts=prompts,
        ),
        calibration=held_out,
        card=lambda description: f"# tiny: {description}\n",
    )


EXPERTS = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 320,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}


def quantized_copy(source: Path, folder: Path, bits: int, dtype: mx.Dtype) -> Path:
    """Write a model in groups of 32, its scales of a type, its embedding in 8 bits."""
    model, config = mlx_lm_load_model(source)
    model.set_dtype(dtype)
    wide = {"group_size": 32, "bits": 8}
    nn.quantize(
        model,
        32,
        bits,
        class_predicate=lambda name, module: (
            hasattr(module, "to_quantized") and (wide if "embed" in name else True)
        ),
    )
    config["quantization"] = {"group_size": 32, "bits": bits, "model.embed_tokens": wide}
    folder.mkdir()
    for file in source.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def base_of(name: str, bits: int | None, dtype: mx.Dtype, folder: Path) -> Path:
    config = EXPERTS if name == "experts" else TINY_CONFIGS[name]
    source = write_random_weights(folder / "source", dict(config))
    if bits is not None:
        return quantized_copy(source, folder / "base", bits, dtype)
    model, _ = mlx_lm_load_model(source)
    model.set_dtype(dtype)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    return source


def inputs_of(base: Path, adapter: Path, folder: Path, **recipe: Any) -> ExportInputs:
    """Return an export to 8 bits: random models are far more sensitive to 5 than real ones."""
    return export_inputs(base, adapter, folder, **{"q_bits": 8, "q_method": "round", **recipe})


def plainly_fused(base: Path, adapter: Path, dtype: mx.Dtype) -> nn.Module:
    """The whole model at once, with mlx-lm's own layers: everything in float32, rounded once."""
    model, _ = mlx_lm_load_model(base)
    for _, module in model.named_modules():
        if "scales" in module:
            module.scales, module.biases = (
                array.astype(mx.float32) for array in (module.scales, module.biases)
            )
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    attach_adapter(model, adapter)
    fused = [
        (n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse") and "lora_a" in m
    ]
    model.update_modules(tree_unflatten(fused))
    model.set_dtype(dtype)
    return model
