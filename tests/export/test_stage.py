"""A model folder says what was done to the model and how to ask it, to whoever has only that."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_ft.export.card import export_section, export_warnings
from mlx_ft.export.survival.words import kept_text
from mlx_ft.model.thinking_mode import thinking_mode_of
from mlx_ft.runs.folder import read_manifest
from mlx_ft.system.files import read_json

TEMPLATE_FILES = ("tokenizer_config.json", "tokenizer.json")


@pytest.fixture
def run(finished_once: Path) -> Path:
    (run,) = (finished_once / "runs").iterdir()
    return run


@pytest.fixture
def info(run: Path) -> dict[str, Any]:
    manifest = read_manifest(run / "export")
    assert manifest is not None
    return dict(json.loads(json.dumps(manifest.info)))


@pytest.fixture
def survival(run: Path) -> dict[str, Any]:
    return dict(read_json(run / "export" / "survival.json"))


def warned(info: dict[str, Any], survival: dict[str, Any] | None) -> str:
    return "\n".join(export_warnings(info, survival))


@pytest.mark.parametrize(("name", "way"), [("fused-f16", "fused"), ("q5", "quantized")])
def test_a_folder_says_what_survived_and_how_to_ask(
    run: Path, finished_once: Path, info: dict[str, Any], name: str, way: str
) -> None:
    folder = run / "export" / name
    readme = (folder / "README.md").read_text()
    survival = read_json(run / "export" / "survival.json")
    kept = kept_text(survival["model"]["ways"][way]["survival"])
    (line,) = (line for line in readme.splitlines() if "(this model)" in line)
    assert line.split(" | ")[1] == kept
    assert all(check["check"] in readme for check in info["checks"])
    assert "Warnings" in readme and f"run {run.name}" in readme
    assert "`enable_thinking=False`" in readme
    assert thinking_mode_of(folder) is False
    for file in TEMPLATE_FILES:
        assert (folder / file).read_bytes() == (finished_once / "model" / file).read_bytes()


def test_a_sound_export_warns_of_nothing(info: dict[str, Any], survival: dict[str, Any]) -> None:
    sound = survival | {"survival": 0.97, "min_survival": 0.9}
    assert warned(info, sound) == ""
    assert "Warnings: none." in list(export_section(info, sound, "quantized"))


def test_what_the_checks_let_pass_is_said(info: dict[str, Any], survival: dict[str, Any]) -> None:
    info["dtype_reason"] = "a number beyond 65,504: the whole model is kept in bfloat16"
    info["quantized"] |= {"method": "gptq", "gptq_layers": 0}
    info["original"] = {
        "path": "/home/somebody/original",
        "from_trained": {
            "into the original": {
                "fused": {"divergence": 0.0123},
                "quantized": {"divergence": 0.0456},
            }
        },
    }
    text = warned(info, survival | {"survival": 0.5, "min_survival": None})
    for part in ("bfloat16", "50.0 %", "no limit", "rounded by itself", "0.0123 nats", "0.0456"):
        assert part in text, part
    assert "somebody" not in text
    assert "nothing (noise is larger)" in warned(info, survival | {"survival": -3.0})
    assert "changed nothing" in warned(info, survival | {"survival": None})
    assert "not measured" in warned(info, None)


def test_a_model_without_a_16_bit_copy_has_a_section_too(
    info: dict[str, Any], survival: dict[str, Any]
) -> None:
    info["fused"] = None
    assert "fused in 16 bits, not kept" in "\n".join(export_section(info, survival, "quantized"))
