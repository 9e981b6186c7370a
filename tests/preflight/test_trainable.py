"""What cannot be trained is refused before it is, and nothing else: compared with mlx-lm itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_ft.errors import ModelError
from mlx_ft.export.layerwise_models import layerwise_of_folder
from mlx_ft.preflight.findings import Finding, PreflightInput
from tests.support.exports import EXPERTS, trained_adapter
from tests.support.models import TINY_CONFIGS, random_model, write_tiny_model
from tests.support.preflight_inputs import finding_of, quickstart, with_recipe

WIDE = {"group_size": 32, "bits": 5}
UPPER = "model.layers.1.mlp.up_proj"


def facts_of(config: dict[str, Any], kind: str, **lora: Any) -> PreflightInput:
    parameters = {"rank": 4, "scale": 4.0, **lora}
    facts = replace(quickstart(), model_config=config)
    return with_recipe(
        facts, "train", num_layers=1, fine_tune_type=kind, lora_parameters=parameters
    )


def found(config: dict[str, Any], kind: str = "dora", **lora: Any) -> Finding:
    return finding_of("dora", facts_of(config, kind, **lora))


def can_be_trained(config: dict[str, Any], keys: list[str] | None = None) -> bool:
    """Whether mlx-lm puts DoRA on the upper layer, its weights as stored, and computes with it."""
    model, settings = random_model(config), config.get("quantization")
    if settings is not None:
        own = {name: each for name, each in settings.items() if isinstance(each, dict | bool)}
        usual = {name: each for name, each in settings.items() if name not in own}
        nn.quantize(
            model,
            **usual,
            class_predicate=lambda name, module: (
                hasattr(module, "to_quantized") and own.get(name, True)
            ),
        )
    lora = {"rank": 4, "scale": 4.0, "dropout": 0.0} | ({"keys": keys} if keys else {})
    try:
        linear_to_lora_layers(model, 1, lora, use_dora=True)
        mx.eval(model(mx.array([[5, 6, 7]])))
    except ValueError:
        return False
    assert any(name.endswith(".m") for name, _ in tree_flatten(model.parameters()))
    return True


CASES: list[tuple[str, dict[str, Any] | None, list[str] | None]] = [
    ("llama", None, None),
    *(("llama", {"group_size": 32, "bits": bits}, None) for bits in (2, 3, 4, 5, 6, 8)),
    ("llama", {"group_size": 32, "bits": 4, UPPER: WIDE}, None),
    ("llama", {"group_size": 32, "bits": 4, UPPER: WIDE}, ["mlp.down_proj"]),
    ("llama", {"group_size": 32, "bits": 4, "model.layers.0.mlp.up_proj": WIDE}, None),
    ("llama", {"group_size": 32, "bits": 5, UPPER: False}, ["mlp.up_proj"]),
    *(
        ("qwen3", {"group_size": 32, "bits": bits}, ["self_attn.q_proj", root])
        for bits in (4, 5)
        for root in ("lm_head", "model.embed_tokens")
    ),
    ("qwen3", {"group_size": 32, "bits": 5, UPPER: False}, ["mlp.up_proj", "lm_head"]),
    ("qwen3", None, ["self_attn.q_proj", "lm_head", "model.embed_tokens"]),
    ("experts", None, None),
    ("experts", {"group_size": 32, "bits": 4}, ["self_attn.q_proj"]),
]


@pytest.mark.parametrize(("model", "quantization", "keys"), CASES)
def test_what_mlx_lm_cannot_compute_is_refused_and_nothing_else(
    model: str, quantization: dict[str, Any] | None, keys: list[str] | None
) -> None:
    config = dict(EXPERTS if model == "experts" else TINY_CONFIGS[model])
    if quantization is not None:
        config["quantization"] = quantization
    finding = found(config, keys=keys) if keys else found(config)
    assert finding.level == ("ok" if can_be_trained(config, keys) else "fail"), finding
    assert found(config, "lora").level == "ok"
    assert bool(finding.fix) == (finding.level == "fail")


def test_an_adapter_that_a_cpu_can_train_is_of_no_use_to_what_comes_behind(tmp_path: Path) -> None:
    """Why it is refused there too: weights are expanded for training, and not for the export."""
    base = write_tiny_model(tmp_path / "base", bits=5)
    adapter = trained_adapter(base, "dora", tmp_path / "adapter")
    with pytest.raises(ModelError, match="the model needs"):
        layerwise_of_folder(base, adapter)


def test_layers_that_are_not_known_are_judged_by_the_bits_that_are_named() -> None:
    def level(quantization: Any) -> str:
        return found({"model_type": "of tomorrow", "quantization": quantization}).level

    assert (
        level(None)
        == level({"bits": 4, "a": {"bits": 8}})
        == level({"bits": 4, "a": False})
        == "ok"
    )
    assert level({"bits": 4, "a": {"bits": 6}}) == "warn"
    assert level({"bits": 5}) == level({"bits": 5, "a": {"bits": 6}}) == "fail"


@pytest.mark.parametrize(
    ("kind", "quantized", "level"),
    [("full", True, "fail"), ("full", False, "ok"), ("dora", True, "ok"), ("lora", True, "ok")],
)
def test_full_training_needs_weights_that_are_not_quantized(
    kind: str, quantized: bool, level: str
) -> None:
    config = TINY_CONFIGS["llama"] | (
        {"quantization": {"group_size": 32, "bits": 4}} if quantized else {}
    )
    assert finding_of("quantized_base", facts_of(config, kind)).level == level
