"""A model reaches LM Studio whole, and nothing that is not the same run's is ever overwritten."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlx_lm import load as mlx_lm_load

from mlx_ft.deploy.lm_studio import MARKER, PUBLISHER, install_lm_studio, lm_studio_models
from mlx_ft.errors import RunError
from mlx_ft.runs.folder import update_record
from mlx_ft.runs.models import exported_model
from mlx_ft.system.console import Console
from mlx_ft.system.files import file_sha256


def install(
    run: Path,
    models: Path | None,
    *,
    name: str | None = None,
    column: str = "quantized",
    link: bool = False,
) -> list[str]:
    console = Console(io.StringIO())
    lines = install_lm_studio(
        run, column=column, name=name, models_folder=models, link=link, console=console
    )
    return list(lines)


def sums(folder: Path) -> dict[str, str]:
    return {p.name: file_sha256(p) for p in folder.iterdir() if p.name != MARKER}


@pytest.mark.parametrize("column", ["quantized", "fused"])
def test_a_model_arrives_byte_for_byte_and_loads(
    finished_run: Path, tmp_path: Path, column: str
) -> None:
    model = exported_model(finished_run, column)
    (model.folder / ".DS_Store").write_text("nobody wants this")
    out = install(finished_run, tmp_path / "models", column=column)
    target = tmp_path / "models" / PUBLISHER / f"{finished_run.name}-{model.folder.name}"
    assert str(target) in out[0] and out[-1].startswith("next     ")
    assert sums(target) == dict(model.sha256), "what was verified, and nothing else"
    assert [p.name for p in target.parent.iterdir()] == [target.name], "nothing left beside it"
    mlx_lm_load(str(target))


def test_the_same_run_may_be_installed_again(finished_run: Path, tmp_path: Path) -> None:
    install(finished_run, tmp_path)
    (target,) = (tmp_path / PUBLISHER).iterdir()
    (target / "config.json").write_text("spoilt")
    (target / "old-shard.safetensors").write_text("of an earlier export")
    install(finished_run, tmp_path)
    assert sums(target) == dict(exported_model(finished_run, "quantized").sha256)


def test_another_model_is_never_overwritten(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    places = tmp_path / PUBLISHER
    for name in ("plain", "other-run", "broken"):
        (places / name).mkdir(parents=True)
        (places / name / "model.safetensors").write_text("somebody's weights")
    (places / "other-run" / MARKER).write_text(json.dumps({"run": "other-12345678"}))
    (places / "broken" / MARKER).write_text("[")
    (places / "file").write_text("a file")
    (places / "link").symlink_to(tmp_path / "elsewhere")
    (places / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(places.rglob("*"))
    for name in ("plain", "other-run", "broken", "file", "link", "dangling"):
        for link in (False, True):
            with pytest.raises(RunError, match="holds another model") as caught:
                install(finished_run, tmp_path, name=name, link=link)
            assert "--name" in caught.value.faults[0].fix
    assert sorted(places.rglob("*")) == before
    assert (places / "plain" / "model.safetensors").read_text() == "somebody's weights"


def test_a_link_and_a_copy_take_each_others_place(finished_run: Path, tmp_path: Path) -> None:
    source = exported_model(finished_run, "quantized")
    for link in (True, True, False, True):
        install(finished_run, tmp_path, name="x", link=link)
        target = tmp_path / PUBLISHER / "x"
        assert target.is_symlink() == link
        assert sums(target) == dict(source.sha256)
        assert [p.name for p in target.parent.iterdir()] == ["x"]
    assert sums(source.folder) == dict(source.sha256), "the run itself is untouched"


@pytest.mark.parametrize("link", [False, True])
def test_a_file_that_changed_does_not_leave(finished_run: Path, tmp_path: Path, link: bool) -> None:
    config = finished_run / "export" / "q5" / "config.json"
    config.write_text(config.read_text().replace("llama", "LLAMA"))
    with pytest.raises(RunError, match="not what the export verified"):
        install(finished_run, tmp_path, link=link)
    assert not list((tmp_path / PUBLISHER).iterdir()) if (tmp_path / PUBLISHER).exists() else True


def test_an_unfinished_run_is_refused_before_anything_is_written(
    finished_run: Path, tmp_path: Path
) -> None:
    update_record(finished_run, status="interrupted")
    with pytest.raises(RunError, match="not finished"):
        install(finished_run, tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a b", "x" * 97, "a\x1b[2J"])
def test_a_name_that_could_leave_the_folder_is_refused(
    finished_run: Path, tmp_path: Path, name: str
) -> None:
    if not name:
        return  # not given: the run's own
    with pytest.raises(RunError, match="cannot name a model"):
        install(finished_run, tmp_path / "models", name=name)


def test_a_disk_without_room_is_a_message(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_ft.deploy.lm_studio.free_disk_bytes", lambda _: 10)
    with pytest.raises(RunError, match="10 B free"):
        install(finished_run, tmp_path)
    assert not (tmp_path / PUBLISHER).exists()


def test_where_lm_studio_keeps_its_models(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert lm_studio_models(home) is None
    (home / ".cache" / "lm-studio").mkdir(parents=True)
    assert lm_studio_models(home) == home / ".cache" / "lm-studio" / "models"
    (home / ".lmstudio").mkdir()
    assert lm_studio_models(home) == home / ".lmstudio" / "models"
    (home / ".lmstudio" / "settings.json").write_text("not JSON")
    assert lm_studio_models(home) == home / ".lmstudio" / "models"
    chosen = {"downloadsFolder": str(tmp_path)}
    (home / ".lmstudio" / "settings.json").write_text(json.dumps(chosen))
    assert lm_studio_models(home) == tmp_path
    moved = tmp_path / "moved"
    (home / ".lmstudio-home-pointer").write_text(f"{moved}\n")
    assert lm_studio_models(home) == tmp_path, "the pointer points nowhere"
    moved.mkdir()
    assert lm_studio_models(home) == moved / "models"


def test_the_command_says_what_it_did(finished_run: Path, tmp_path: Path) -> None:
    def mlx_ft(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "mlx_ft", "install", str(finished_run), *arguments]
        env = os.environ | {"HOME": str(tmp_path)}
        return subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=60, check=False
        )

    missing = mlx_ft("--lm-studio")
    assert missing.returncode == 2 and "--models-folder" in missing.stderr, missing.stderr
    assert mlx_ft().returncode == 2
    assert mlx_ft("--ollama", "--link").returncode == 2
    (tmp_path / ".lmstudio").mkdir()
    done = mlx_ft("--lm-studio", "--name", "mine")
    assert done.returncode == 0, done.stderr
    target = tmp_path / ".lmstudio" / "models" / PUBLISHER / "mine"
    first, last = done.stdout.splitlines()
    assert first.startswith(f"model    {target} (")
    assert last == "next     in LM Studio, choose mlx-ft/mine under My Models"
    assert (target / "model.safetensors").exists()


INSTALL_AND_DIE = """
import os, pathlib, signal, sys
from mlx_ft.system.console import Console
from mlx_ft.deploy.lm_studio import install_lm_studio

moment, target = int(sys.argv[3]), sys.argv[2]

def hook(event, arguments):
    global moment
    if event in ("shutil.copyfile", "os.rename", "shutil.rmtree", "os.mkdir"):
        if target in "".join(map(str, arguments)):
            if moment == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            moment -= 1

sys.addaudithook(hook)
list(install_lm_studio(
    pathlib.Path(sys.argv[1]), column="quantized", name="x", models_folder=pathlib.Path(target),
    link=False, console=Console(),
))
"""


@pytest.mark.slow
def test_a_kill_leaves_a_whole_model_or_none(finished_run: Path, tmp_path: Path) -> None:
    """Killed before its nth change, an installation leaves the old model, the new one, or none at
    its place; and the next one succeeds.
    """
    model = exported_model(finished_run, "quantized")
    target = tmp_path / PUBLISHER / "x"
    command = [sys.executable, "-c", INSTALL_AND_DIE, str(finished_run), str(tmp_path)]
    for step, expected in ((3, {False}), (1, {True, False})):  # the second time it is there already
        seen, moment = set(), 0
        while True:
            done = subprocess.run(
                [*command, str(moment)], capture_output=True, text=True, timeout=60, check=False
            )
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL, done.stderr
            seen.add(target.exists())
            if target.exists():
                assert sums(target) == dict(model.sha256)
            elif step == 1:
                install(finished_run, tmp_path, name="x")
            moment += step
        assert moment > 8 and seen == expected
        assert sums(target) == dict(model.sha256)
        assert [p.name for p in target.parent.iterdir()] == ["x"]
