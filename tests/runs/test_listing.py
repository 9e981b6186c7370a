"""What a run is doing is told from a lock that dies with its process, not from what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_ft.errors import RunError
from mlx_ft.report.runs_table import next_line, runs_json, runs_text
from mlx_ft.runs.folder import update_record
from mlx_ft.runs.listing import disk_bytes, list_runs, run_folders
from mlx_ft.runs.lock import LOCK_FILE, worked_on, working
from mlx_ft.runs.state import SILENT_SECONDS, state_of
from mlx_ft.system.files import read_json, write_json
from tests.support.run_folders import HOSTILE, TOKEN, metrics, write_lines, write_run, write_seeds

HOLD = (
    "import sys, time, pathlib; from mlx_ft.runs.lock import working\n"
    "with working(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
)


def running_run(folder: Path) -> Path:
    run = write_run(folder, "interrupted")
    update_record(run, status="running", exit_reason=None)
    return run


def holder_of(run: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize(
    ("ended", "state"),
    [
        ("done", "finished"),
        ("gate_failed", "gate_failed"),
        ("interrupted", "interrupted"),
        ("failed", "failed"),
    ],
)
def test_an_ended_run_is_in_the_state_that_it_recorded(
    tmp_path: Path, ended: str, state: str
) -> None:
    assert state_of(write_run(tmp_path, ended)).name == state


def test_a_run_is_running_as_long_as_its_process_lives_and_dead_after_a_kill(
    tmp_path: Path,
) -> None:
    run = running_run(tmp_path / "my runs")
    process = holder_of(run)
    with process:
        state = state_of(run, time.time())
        assert state.name == "running" and state.seconds_left is not None
        assert "iteration 90 of 240" in state.words and "left" in state.words
        found = f"process {process.pid} works on it"
        with pytest.raises(RunError, match=found) as caught, working(run):
            pass
        assert caught.value.faults[0].fix.endswith(f": mlx-ft watch '{run}'")
        process.kill()
        process.wait()
    assert (worked_on(run), state_of(run).name) == (False, "dead")
    with working(run):
        assert worked_on(run) is True
    assert worked_on(run) is False


def test_a_training_of_several_seeds_is_at_the_one_that_is_trained(tmp_path: Path) -> None:
    run = write_seeds(running_run(tmp_path), finished=[0], unfinished=1)
    with working(run):
        state = state_of(run)
        assert state.words.startswith("seed 1, iteration 90 of 240")
        assert state.seconds_left is not None
        (run / "train.tmp" / "seed-1.tmp").rename(run / "train.tmp" / "seed-1")
        assert state_of(run).words == "at train"  # the next one has not measured yet


def test_a_run_without_a_lock_is_dead_when_it_was_silent_for_long(tmp_path: Path) -> None:
    run = running_run(tmp_path)
    assert worked_on(run) is None
    now = time.time()
    assert state_of(run, now + 1).name == "running"
    assert state_of(run, now + SILENT_SECONDS + 60).name == "dead"


def test_time_left_runs_down_while_nothing_is_reported(tmp_path: Path) -> None:
    run = running_run(tmp_path)
    write_lines(run / "train.tmp" / "metrics.jsonl", metrics(90))
    now = os.stat(run / "train.tmp" / "metrics.jsonl").st_mtime
    first, later = state_of(run, now), state_of(run, now + 60)
    assert first.seconds_left is not None and later.seconds_left is not None
    assert first.seconds_left - later.seconds_left == pytest.approx(60, abs=0.01)
    assert state_of(run, now + 1000).seconds_left == 0


def test_runs_are_listed_newest_first_and_filtered(tmp_path: Path) -> None:
    for number, ended in enumerate(("done", "failed", "interrupted")):
        run = write_run(tmp_path / "made", ended).rename(tmp_path / f"exp{number}-0a1b2c3d")
        record = read_json(run / "run.json")
        write_json(run / "run.json", {**record, "created": 1e9 + number, "run": run.name})
    (tmp_path / "no-run").mkdir()
    (tmp_path / "file").touch()
    names = [run.name[:4] for run in run_folders(tmp_path)]
    assert names == ["exp2", "exp1", "exp0"]
    assert [e["state"] for e in list_runs(tmp_path, ["failed", "finished"])] == [
        "failed",
        "finished",
    ]
    assert [e["run"] for e in list_runs(tmp_path, names=["exp[12]"])] == [
        "exp2-0a1b2c3d",
        "exp1-0a1b2c3d",
    ]
    assert len(list_runs(tmp_path, newest=2)) == 2
    with pytest.raises(RunError, match="no such folder"):
        run_folders(tmp_path / "nowhere")


def test_the_list_says_state_scores_and_disk_and_json_says_the_same(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    entries = list_runs(tmp_path)
    text = runs_text(entries)
    assert "code_mode 0.00 -> 0.96" in text and "finished" in text and "0.0623" in text
    assert json.loads(runs_json(entries))["runs"][0]["disk_bytes"] == disk_bytes(run)
    assert next_line(entries) == f"next     mlx-ft show {run}"
    assert runs_text([]) == "no such run\n"


def test_a_run_whose_base_alone_was_asked_has_one_score_and_no_change(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    results = json.loads((run / "eval" / "results.json").read_text())
    for columns in results["suites"].values():
        for name in set(columns) - {"base"}:
            del columns[name]
    write_json(run / "eval" / "results.json", results)
    text = runs_text(list_runs(tmp_path))
    assert "code_mode 0.00 (base)" in text and "code_mode 0.00 ->" not in text


def test_hostile_reasons_and_a_token_stay_out_of_the_list(tmp_path: Path) -> None:
    run = write_run(tmp_path, "failed")
    update_record(run, exit_reason=HOSTILE.replace("\ud800", ""))
    text = runs_text(list_runs(tmp_path))
    assert "\x1b" not in text and TOKEN not in text and max(map(len, text.splitlines())) < 400


def test_two_at_once_on_one_run_is_refused(tmp_path: Path) -> None:
    with working(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == f"{os.getpid()}\n"
        other = subprocess.run(
            [sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True, check=False
        )
    assert other.returncode == 1
    assert f"process {os.getpid()} works on it" in other.stderr
