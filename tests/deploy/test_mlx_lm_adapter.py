"""A delivered adapter is whole, and nothing that is not an adapter is ever overwritten."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_ft.deploy.mlx_lm_adapter import ADAPTER_FILES, deliver_adapter, require_deliverable
from mlx_ft.errors import RunError

WEIGHTS, CONFIG = ADAPTER_FILES


def write_adapter(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_text(f"weights {content}")
    (folder / CONFIG).write_text(json.dumps({"scale": content}))
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_an_adapter_arrives_byte_for_byte_in_a_new_folder(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", "new")
    target = tmp_path / "deep" / "down" / "adapters"
    require_deliverable(target)
    deliver_adapter(adapter, target)
    assert contents(target) == contents(adapter)
    require_deliverable(target)


def test_an_older_adapter_is_replaced_and_its_numbered_copies_stay(tmp_path: Path) -> None:
    target = write_adapter(tmp_path / "target", "old")
    (target / "0000100_adapters.safetensors").write_text("numbered")
    require_deliverable(target)
    adapter = write_adapter(tmp_path / "adapter", "new")
    deliver_adapter(adapter, target)
    expected = {**contents(adapter), "0000100_adapters.safetensors": "numbered"}
    assert contents(target) == expected


def test_foreign_files_are_named_and_refused(tmp_path: Path) -> None:
    for name in ("notes.txt", "model.safetensors", "config.json", ".hidden", "adapters.npz"):
        target = tmp_path / f"target-{name}"
        target.mkdir()
        (target / name).touch()
        with pytest.raises(RunError, match=r"holds other files") as caught:
            require_deliverable(target)
        assert name in str(caught.value) and "adapter_path" in caught.value.faults[0].fix


def test_links_and_files_are_no_place_for_an_adapter(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for name in ("link", "dangling", "file"):
        with pytest.raises(RunError, match="not a plain folder"):
            require_deliverable(tmp_path / name)
    with pytest.raises(RunError, match="cannot be written"):
        require_deliverable(tmp_path / "file" / "inside")


def test_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked about the nearest folder that exists; patched, because root may write anywhere."""
    asked: list[tuple[Path, int]] = []

    def refuse(place: Path, mode: int) -> bool:
        asked.append((place, mode))
        return False

    monkeypatch.setattr("mlx_ft.deploy.mlx_lm_adapter.os.access", refuse)
    with pytest.raises(RunError, match="cannot be written"):
        require_deliverable(tmp_path / "not" / "yet" / "there")
    assert asked == [(tmp_path, os.W_OK)]


DELIVER_AND_DIE = """
import os, pathlib, signal, sys
from mlx_ft.deploy.mlx_lm_adapter import deliver_adapter

moment = int(sys.argv[3])

def hook(event, arguments):
    global moment
    if event in ("shutil.copyfile", "os.remove", "os.rename"):
        if moment == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        moment -= 1

sys.addaudithook(hook)
deliver_adapter(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""


@pytest.mark.parametrize("moment", range(6))
def test_a_kill_never_leaves_weights_beside_another_config(tmp_path: Path, moment: int) -> None:
    """Killed before its nth change to the target, a delivery leaves an adapter or none, and the
    next one succeeds: mlx-lm would load new weights with the old scale without a word.
    """
    adapter = write_adapter(tmp_path / "adapter", "new")
    target = write_adapter(tmp_path / "target", "old")
    command = [sys.executable, "-c", DELIVER_AND_DIE, str(adapter), str(target), str(moment)]
    done = subprocess.run(command, check=False, timeout=60)
    assert done.returncode == (-signal.SIGKILL if moment < 5 else 0)
    found = contents(target)
    if CONFIG in found and WEIGHTS in found:
        whole = "old" if moment < 3 else "new"
        assert (found[WEIGHTS], found[CONFIG]) == (f"weights {whole}", f'{{"scale": "{whole}"}}')
    else:
        assert CONFIG not in found, "without its weights"
    require_deliverable(target)
    deliver_adapter(adapter, target)
    assert contents(target) == contents(adapter)


def test_the_config_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses the first rename: there is no config, so there is no adapter to load."""
    adapter = write_adapter(tmp_path / "adapter", "new")

    def refuse(source: Path, target: Path) -> Path:
        assert target.name == WEIGHTS and not (target.parent / CONFIG).exists()
        raise OSError("disk full")

    monkeypatch.setattr("mlx_ft.deploy.mlx_lm_adapter.Path.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        deliver_adapter(adapter, tmp_path / "target")
