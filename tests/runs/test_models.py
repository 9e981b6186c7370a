"""What a run gives away: only what is finished, passed every gate, and is still what it was."""

import shutil
from pathlib import Path

import pytest

from mlx_ft.errors import GateFailed, RunError
from mlx_ft.runs.folder import update_record
from mlx_ft.runs.models import (
    column_folders,
    exported_model,
    read_run,
    require_finished,
    require_unchanged,
)
from mlx_ft.system.files import read_json, write_json


def test_a_finished_run_gives_out_both_models(finished_run: Path) -> None:
    for column, folder in (("quantized", "q5"), ("fused", "fused-f16")):
        model = exported_model(finished_run, column)
        assert model.folder == finished_run / "export" / folder
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(model.sha256)
        on_disk = sum(p.stat().st_size for p in model.folder.iterdir())
        assert model.size_bytes == on_disk
        require_unchanged(model)


def test_columns_are_folders_that_are_there(finished_run: Path) -> None:
    made = read_run(finished_run)
    base, none = column_folders(made, "base")
    assert none is None and (base / "model.safetensors").exists()
    assert column_folders(made, "adapter") == (base, finished_run / "train" / "adapter")
    assert column_folders(made, "fused") == (finished_run / "export" / "fused-f16", None)
    shutil.rmtree(finished_run / "train")
    with pytest.raises(RunError, match="not whole"):
        column_folders(made, "adapter")


def test_a_base_model_that_is_gone_is_said(finished_run: Path) -> None:
    record = read_json(finished_run / "run.json")
    write_json(finished_run / "run.json", {**record, "model": {**record["model"], "path": "/no"}})
    with pytest.raises(RunError, match="no longer there"):
        column_folders(read_run(finished_run), "base")


@pytest.mark.parametrize("status", ["running", "interrupted", "failed", "stopped", None])
def test_a_run_that_is_not_finished_stays(finished_run: Path, status: str | None) -> None:
    update_record(finished_run, status=status)
    with pytest.raises(RunError, match="not finished") as caught:
        exported_model(finished_run, "quantized")
    assert "run the recipe again" in str(caught.value)


def test_a_run_that_a_gate_stopped_stays(finished_run: Path) -> None:
    update_record(finished_run, status="gate_failed", exit_reason="it loops")
    with pytest.raises(GateFailed, match="it loops"):
        exported_model(finished_run, "quantized")


def test_an_export_check_that_failed_keeps_it_here(finished_run: Path) -> None:
    path = finished_run / "export" / "manifest.json"
    manifest = read_json(path)
    manifest["info"]["checks"][1]["ok"] = False
    write_json(path, manifest)
    with pytest.raises(GateFailed, match="bits of every layer"):
        require_finished(read_run(finished_run))


@pytest.mark.parametrize("stage", ["data", "train", "export", "eval"])
def test_a_stage_that_is_missing_keeps_it_here(finished_run: Path, stage: str) -> None:
    (finished_run / stage / "manifest.json").unlink()
    with pytest.raises(RunError, match=stage):
        require_finished(read_run(finished_run))


def test_one_changed_byte_is_found(finished_run: Path) -> None:
    model = exported_model(finished_run, "quantized")
    weights = model.folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RunError, match=r"model\.safetensors: its content is not"):
        require_unchanged(exported_model(finished_run, "quantized"))


def test_a_fused_model_that_was_not_kept_says_which_key(finished_run: Path) -> None:
    path = finished_run / "export" / "manifest.json"
    manifest = read_json(path)
    del manifest["info"]["fused"]
    write_json(path, manifest)
    with pytest.raises(RunError, match="keep_fused"):
        exported_model(finished_run, "fused")


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such folder"):
        read_run(tmp_path / "none")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunError, match="no readable run"):
        read_run(tmp_path)
