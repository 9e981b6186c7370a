"""Trackers get everything once, in one run, and can do the training no harm.

The trackers here are packages of the test's own, put in the way of the real ones: they write down
what they are told, raise, or never come to an end.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlx_ft.errors import InputError
from mlx_ft.inputs import open_run
from mlx_ft.recipe.load import load_recipe
from mlx_ft.report.trackers.follow import read_memory
from mlx_ft.report.trackers.processes import tracked
from mlx_ft.report.trackers.services import KINDS, missing_packages, values_of
from mlx_ft.system.console import Console
from mlx_ft.system.files import read_json, write_json
from mlx_ft.text.safe import REDACTED, without_secrets
from tests.support.jobs import write_place
from tests.support.run_folders import metrics, write_lines, write_run

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef" * 2,
    "HF_TOKEN": "hf_" + "PlantedFakeTokenOfTheTest7654321",
    "OPENAI_API_KEY": "sk-" + "planted-fake-key-of-the-test",
    "SWANLAB_API_KEY": "planted-swanlab-key",
}
NOTES = """
import json, os, pathlib
def note(**told):
    with open(os.environ["TOLD"], "a") as stream:
        stream.write(json.dumps(told) + "\\n")
"""
TRACKIO = f"""{NOTES}
def init(**given):
    note(init=given)
    print(os.environ["HF_TOKEN"], "is my token")
def log(values, step=None):
    note(step=step, **values)
def finish():
    note(finish=True)
"""
RAISES = """
import os
class Settings:
    def __init__(self, **given):
        pass
def init(**given):
    raise ValueError("no login with " + os.environ["WANDB_API_KEY"] + " at the server")
"""
HANGS = """
import os, pathlib, time
def init(**given):
    time.sleep(600)
    pathlib.Path(os.environ["TOLD"]).write_text("woke")
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in which the test's own trackio notes what it is told; secrets are planted."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name, code in (("trackio", TRACKIO), ("wandb", RAISES), ("swanlab", HANGS)):
        (packages / f"{name}.py").write_text(code)
    inherited = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(packages), inherited))))
    monkeypatch.setenv("TOLD", str(tmp_path / "told.jsonl"))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "told.jsonl"


def read_told(told: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not happen"
        time.sleep(0.05)


def train(run: Path, upto: int) -> None:
    write_lines(run / "train.tmp" / "metrics.jsonl", metrics(upto))


def sent(run: Path) -> int:
    iterations: dict[str, int] = read_memory(run, "trackio").get("sent", {})
    return iterations.get("train", 0)


def has_sent(run: Path, iteration: int) -> bool:
    return sent(run) >= iteration


def test_everything_is_told_once_in_one_run_although_trainings_begin_anew(
    tmp_path: Path, told: Path
) -> None:
    run = write_run(tmp_path / "runs", "interrupted")
    out = io.StringIO()
    for session in ((60, 40, 80), (100, 100, 120)):
        with tracked(run, ["trackio"], "mine", Console(out)):
            for iterations in session:
                train(run, iterations)
                wait_until(partial(has_sent, run, iterations))
    lines = read_told(told)
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(5, 121, 5))
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 40, 80, 120]
    opened = [line["init"] for line in lines if "init" in line]
    assert len(opened) == 2
    assert {(each["name"], each["project"], each["resume"]) for each in opened} == {
        (run.name, "mine", "allow")
    }
    assert opened[0]["config"]["train.learning_rate"] == 4e-4
    assert sum("finish" in line for line in lines) == 2
    assert "stopped following" not in out.getvalue()


def test_final_scores_are_told_at_the_end(tmp_path: Path, told: Path) -> None:
    run = write_run(tmp_path / "runs")
    with tracked(run, ["trackio"], None, Console(io.StringIO())):
        pass
    (scores,) = [line for line in read_told(told) if "scores/code_mode/base" in line]
    assert scores["scores/code_mode/base"] == 0
    assert scores["scores/code_mode/quantized"] == pytest.approx(26 / 27)
    assert scores["final/eval_loss"] == 0.0623


def test_a_tracker_that_fails_is_told_of_once_with_its_reason_and_without_its_key(
    tmp_path: Path, told: Path
) -> None:
    run = write_run(tmp_path / "runs")
    out = io.StringIO()
    with tracked(run, ["wandb"], None, Console(out)):
        wait_until(lambda: "stopped following" in out.getvalue())
    warnings = [line for line in out.getvalue().splitlines() if "ValueError" in line]
    assert warnings == [
        f"wandb stopped following (ValueError: no login with {REDACTED} at the server); the run "
        "goes on"
    ]


def test_a_tracker_that_never_ends_holds_the_run_up_for_so_long_and_no_longer(
    tmp_path: Path, told: Path
) -> None:
    run = write_run(tmp_path / "runs")
    out = io.StringIO()
    with tracked(run, ["swanlab"], None, Console(out), patience_seconds=0.5):
        before = out.getvalue()
    assert "follows this run" in before and "ended" not in before
    assert "was ended" in out.getvalue()
    assert not told.exists(), "it was waited for until it woke"


def test_no_planted_secret_reaches_a_file_or_the_terminal(tmp_path: Path, told: Path) -> None:
    run = write_run(tmp_path / "runs")
    stored = read_json(run / "recipe.json")
    stored["recipe"]["data"]["path"] = SECRETS["HF_TOKEN"]
    write_json(run / "recipe.json", stored)
    out = io.StringIO()
    with tracked(run, ["trackio", "wandb"], None, Console(out)):
        wait_until(lambda: "stopped following" in out.getvalue())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    files.remove(run / "recipe.json")
    assert told in files and run / "trackers" / "wandb.json" in files
    for secret in SECRETS.values():
        assert secret not in out.getvalue()
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


@pytest.mark.slow
def test_a_whole_run_tells_its_trackers_and_outlives_one_that_fails(
    tmp_path: Path, told: Path
) -> None:
    write_place(tmp_path)
    command = [sys.executable, "-m", "mlx_ft", "run", "r.yaml"]
    command += ["--set", "train.report_to=[trackio, wandb]"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "wandb stopped following" in done.stdout + done.stderr
    (run,) = (tmp_path / "runs").glob("tiny-*")
    lines = read_told(told)
    measured = [
        json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = {line["iteration"]: line["loss"] for line in measured if line["kind"] == "train"}
    assert losses and losses == {
        line["step"]: line["train/loss"] for line in lines if "train/loss" in line
    }
    (scores,) = [line for line in lines if any(key.startswith("scores/") for key in line)]
    assert {"scores/small/base", "scores/small/quantized"} <= set(scores)
    assert lines[-1] == {"finish": True}


def test_a_tracker_ends_with_its_parent_however_that_ends(tmp_path: Path, told: Path) -> None:
    run = write_run(tmp_path / "runs")
    code = (
        "import pathlib, sys, time\nfrom mlx_ft.system.console import Console\n"
        "from mlx_ft.report.trackers.processes import tracked\n"
        "with tracked(pathlib.Path(sys.argv[1]), ['trackio'], None, Console()):\n"
        "    print('begun', flush=True)\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"begun\n"
        wait_until(lambda: sent(run) == 240)
        parent.kill()
    wait_until(lambda: any("finish" in line for line in read_told(told)))


def test_a_missing_package_is_an_error_before_training_with_the_line_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_ft.report.trackers.services.find_spec", lambda name: None)
    assert len(missing_packages(list(KINDS))) == len(KINDS) == 5
    loaded = load_recipe(Path("r.yaml"), ["train.report_to=[wandb, tensorboard]"])
    with pytest.raises(InputError) as raised:
        open_run(loaded, Path("runs"), Console(io.StringIO()))
    assert [fault.fix.partition(",")[0] for fault in raised.value.faults] == [
        "pip install wandb",
        "pip install tensorboardX tensorboard",
    ]


def test_who_is_told_changes_nothing_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Path
) -> None:
    write_place(tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setattr("mlx_ft.report.trackers.services.find_spec", lambda name: name)
    sets: tuple[list[str], ...] = ([], ["train.report_to=[trackio]", "train.project_name=other"])
    plain, reported = (
        open_run(load_recipe(Path("r.yaml"), each), Path("runs"), Console(io.StringIO()))
        for each in sets
    )
    assert (plain.job.inputs, plain.job.folder) == (reported.job.inputs, reported.job.folder)


def test_names_are_those_that_trackers_users_know() -> None:
    line, validation = metrics(240)[-2:]
    finite = {"train/loss", "train/learning_rate", "train/peak_memory_gb", "train/global_step"}
    assert finite <= set(values_of(line, lambda value: value is not None))
    assert set(values_of(validation, lambda value: value is not None)) == {"eval/loss"}
    assert values_of({"kind": "skipped", "loss": 1.0}, bool) == {}


def test_secrets_are_replaced_by_value_and_by_form() -> None:
    environment = {"MY_API_KEY": "abcdefgh1", "HF_TOKEN": "true", "HOME": "/home/someone"}
    text = without_secrets(f"abcdefgh1 true /home/someone {SECRETS['HF_TOKEN']}", environment)
    assert text == f"{REDACTED} true /home/someone {REDACTED}"
