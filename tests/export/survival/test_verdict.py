"""A model that lost what it learned is stopped with its evidence; bits are the fewest that keep it.

With tiny random models, through the whole export; mlx-lm itself loads what is written.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_ft.engine.load import load_weights
from mlx_ft.errors import GateFailed
from mlx_ft.export.bit_widths import Bits, described_quantization
from mlx_ft.export.build import ExportInputs, export_model
from mlx_ft.export.survival.measures import Change, Divergence, Kept, LayerAudit
from mlx_ft.export.survival.verdict import (
    FORMS,
    Survival,
    layer_bits_for,
    next_bits,
    require_survival,
    survives,
)
from mlx_ft.export.verify_checks import layer_bits
from mlx_ft.recipe.schema import ExportRecipe
from mlx_ft.system.console import Console
from mlx_ft.system.files import read_json
from tests.support.exports import export_inputs, trained_adapter
from tests.support.models import write_tiny_model
from tests.support.slow import fast_first

ROWS = [[int(token) for token in np.random.default_rng(5).integers(3, 300, 12)] for _ in range(6)]
STRONG, WEAK = 0.3, 1e-4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"), "llama", bits=4)


def exported(base: Path, folder: Path, strength: float, **recipe: object) -> ExportInputs:
    """Inputs with an adapter of this strength on every projection of the upper of two layers."""
    adapter = trained_adapter(
        base, "lora", folder / "adapter", lambda name, array, noise: noise * strength**0.5
    )
    values = {"q_method": "round", **recipe}
    inputs = export_inputs(
        base,
        adapter,
        folder / "export",
        held_out=ROWS[:4],
        trained=[range(5, 11)] * 4,
        prompts=ROWS[4:],
        **values,
    )
    return replace(inputs, calibration=ROWS)


def test_the_file_says_what_each_way_of_storing_keeps(base: Path, tmp_path: Path) -> None:
    inputs = exported(base, tmp_path, STRONG, min_survival=None)
    export_model(inputs, Console(io.StringIO()))
    found = read_json(inputs.folder / "survival.json")
    assert found["positions"] == {"held_out": 24, "prompts": 24}
    ways: Mapping[str, Mapping[str, float]] = found["model"]["ways"]
    assert list(ways) == list(FORMS)
    assert ways["fused"]["survival"] > 0.999
    assert ways["quantized"] == pytest.approx(ways["round-5"], rel=1e-3), "the same weights"
    kept = [ways[f"round-{bits}"]["survival"] for bits in (4, 5, 6, 8)]
    # Neighbours may change places in a random model of two layers; the ends may not.
    assert kept[0] < kept[3] == max(kept) and kept[3] > 0.97
    assert found["survival"] == ways["quantized"]["survival"]
    names = [layer["name"] for layer in found["layers"]]
    assert sorted(names) == sorted(inputs.adapted_modules)
    for layer in found["layers"]:
        assert layer["bits"] == 5 and layer["delta_over_weight"] > 0.01
        final, rounding = layer["kept"]["quantized"], layer["kept"]["round-5"]
        assert final == pytest.approx(rounding, rel=1e-4), "read back from the files"
        outputs = [layer["kept"][f"round-{bits}"]["output_noise"] for bits in (4, 5, 6, 8)]
        assert outputs == sorted(outputs, reverse=True)


def test_gptq_keeps_more_of_outputs_than_rounding(base: Path, tmp_path: Path) -> None:
    inputs = exported(base, tmp_path, STRONG, q_method="gptq", min_survival=None)
    export_model(inputs, Console(io.StringIO()))
    layers = read_json(inputs.folder / "survival.json")["layers"]
    noise = [
        [layer["kept"][way]["output_noise"] for layer in layers] for way in ("quantized", "round-5")
    ]
    assert np.mean(noise[0]) < np.mean(noise[1])


def test_a_delta_that_vanished_stops_the_run_with_its_evidence(base: Path, tmp_path: Path) -> None:
    inputs = exported(base, tmp_path, WEAK, q_bits=4)
    with pytest.raises(GateFailed) as stopped:
        export_model(inputs, Console(io.StringIO()))
    first, *layers = stopped.value.faults
    assert first.where == "export.min_survival 0.9"
    assert "the 4-bit model keeps nothing (noise is larger)" in first.found
    assert "export.q_bits: " in first.fix or "no number of bits keeps it" in first.fix
    assert len(layers) == 3 and all("of its change is left" in fault.found for fault in layers)
    assert read_json(inputs.folder / "survival.json")["survival"] < 0
    without = replace(
        inputs,
        folder=tmp_path / "without",
        recipe=inputs.recipe.model_copy(update={"min_survival": None}),
    )
    without.folder.mkdir()
    assert export_model(without, Console(io.StringIO()))["quantized"]["bits"] == 4


def test_an_adapter_that_changed_nothing_is_stopped(base: Path, tmp_path: Path) -> None:
    with pytest.raises(GateFailed, match="training changed nothing on held-out rows"):
        export_model(exported(base, tmp_path, 0.0), Console(io.StringIO()))


@pytest.mark.slow
@pytest.mark.parametrize("strength", fast_first([STRONG, 0.05]))
def test_auto_takes_the_fewest_bits_that_pass_and_mlx_lm_loads_them(
    base: Path, tmp_path: Path, strength: float
) -> None:
    inputs = exported(base, tmp_path, strength, q_bits="auto", min_survival=0.97)
    info = export_model(inputs, Console(io.StringIO()))["quantized"]
    found = read_json(inputs.folder / "survival.json")
    assert found["survival"] >= 0.97
    below = [b for b in (4, 5, 6, 8) if b < info["bits"] or (b == info["bits"] and info["raised"])]
    assert all(found["model"]["ways"][f"round-{b}"]["survival"] < 0.97 for b in below)
    folders = sorted(path.name for path in inputs.folder.iterdir() if path.is_dir())
    assert folders == sorted(["fused-f16", info["path"]]), "what was tried is gone"
    small = inputs.folder / info["path"]
    bits = layer_bits(small)
    assert bits == {module: info["raised"].get(module, info["bits"]) for module in bits}
    model, _ = mlx_lm.load(str(small))
    ours, _, _ = load_weights(small)
    ids = mx.array([ROWS[0]])
    assert mx.allclose(model(ids).astype(mx.float32), ours(ids), atol=0.05).item()
    assert {module.bits for _, module in model.named_modules() if "scales" in module} == {
        *bits.values()
    }


def layer(name: str, kept: Mapping[str, float]) -> LayerAudit:
    ways = {way: Kept(Change(1.0, 0.0, 1 - survival)) for way, survival in kept.items()}
    return LayerAudit(name, 1.0, 1.0, ways)


def audited(bits: Bits, kept: Mapping[str, float], layers: list[LayerAudit]) -> Survival:
    held_out = {way: Divergence(1 - survival, 0.0) for way, survival in kept.items()}
    positions = {"held_out": 1, "prompts": 1}
    return Survival(bits, Divergence(1.0, 0.5), held_out, {}, layers, positions, 0.0)


ROUNDED = {"round-4": 0.1, "round-5": 0.6, "round-6": 0.93, "round-8": 0.99}
AUTO = ExportRecipe(q_bits="auto", min_survival=0.9)


def test_only_layers_that_fail_get_more_bits_and_only_when_that_is_needed() -> None:
    good = layer("good", {"quantized": 0.95, **ROUNDED})
    bad = layer("bad", {"quantized": 0.2, **ROUNDED})
    first = next_bits(AUTO, None)
    assert first == Bits(4)
    failed = audited(first, {"quantized": 0.5}, [good, bad])
    raised = next_bits(AUTO, failed)
    assert raised == Bits(4, {"bad": 6})
    assert next_bits(AUTO, audited(raised, {"quantized": 0.91}, [good, bad])) is None
    assert next_bits(AUTO, audited(raised, {"quantized": 0.8}, [good, bad])) == Bits(5)
    assert next_bits(AUTO, audited(Bits(4), {"quantized": 0.5}, [good])) == Bits(5)
    assert next_bits(AUTO, audited(Bits(8), {"quantized": 0.5}, [bad])) is None
    assert layer_bits_for(bad, 6, 0.9) == 8 and layer_bits_for(bad, 4, 0.999) == 8


def test_bits_of_a_recipe_are_tried_once_and_advice_names_bits_that_pass() -> None:
    recipe = ExportRecipe(q_bits=4)
    assert next_bits(recipe, None) == Bits(4)
    lost = audited(Bits(4), {"fused": 1.0, "quantized": 0.3, **ROUNDED}, [])
    assert next_bits(recipe, lost) is None and not survives(lost, 0.9)
    with pytest.raises(GateFailed, match=r"keeps 30\.0%.*set export\.q_bits: 6"):
        require_survival(lost, recipe)
    with pytest.raises(GateFailed, match="even the 16-bit model lost it"):
        require_survival(audited(Bits(4), {"fused": 0.2, "quantized": 0.1}, []), recipe)
    with pytest.raises(GateFailed, match="no number of bits keeps it"):
        require_survival(audited(Bits(8), {"fused": 1.0, "quantized": 0.1}, []), recipe)
    require_survival(audited(Bits(4), {"quantized": 0.9}, []), recipe)
    sound = layer("sound", {"quantized": 0.99, **ROUNDED})
    with pytest.raises(GateFailed, match="lost in layers that were not trained"):
        require_survival(audited(Bits(4), {"quantized": 0.3}, [sound]), recipe)


@pytest.mark.parametrize("usual", [4, 5, 6, 8])
def test_a_config_names_the_layers_that_differ(usual: Literal[4, 5, 6, 8]) -> None:
    config = {"model_type": "llama", "hidden_size": 64}
    plain = described_quantization(config, Bits(usual), 64)
    assert plain["quantization"] == {"group_size": 64, "bits": usual, "mode": "affine"}
    mixed = described_quantization(config, Bits(usual, {"a.b": 8}), 64)
    assert mixed["quantization"]["a.b"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert mixed["quantization"] == mixed["quantization_config"]
    assert json.dumps(config) == json.dumps({"model_type": "llama", "hidden_size": 64})
    assert (Bits(usual).folder, Bits(4, {"a": 8}).folder) == (f"q{usual}", "q4-mixed")
