"""Watching reads a run and nothing more; it ends when the run ends, and Ctrl-C ends only it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.errors import RunError
from mlx_ft.report.live import picture
from mlx_ft.report.watch import watch
from mlx_ft.runs.folder import update_record
from mlx_ft.runs.lock import working
from mlx_ft.text.sparklines import BARS, trend
from tests.support.run_folders import (
    HOSTILE,
    TOKEN,
    metrics,
    write_lines,
    write_run,
    write_seeds,
    write_train,
)


def running_run(folder: Path) -> Path:
    run = write_run(folder, "interrupted")
    update_record(run, status="running", exit_reason=None)
    return run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def acts(*steps: Callable[[], object]) -> Callable[[float], None]:
    """Return a sleep that does the next of `steps` each time."""
    left = iter(steps)

    def sleep(seconds: float) -> None:
        next(left)()

    return sleep


def test_a_log_has_every_measurement_once_although_the_run_was_resumed(tmp_path: Path) -> None:
    run, out = running_run(tmp_path), io.StringIO()
    path = run / "train.tmp" / "metrics.jsonl"
    with working(run):
        code = watch(
            run,
            out,
            acts(
                lambda: write_lines(path, metrics(100)),
                lambda: write_lines(path, metrics(60)),
                lambda: write_lines(path, metrics(105)),
                lambda: update_record(run, status="done"),
            ),
        )
    lines = out.getvalue().splitlines()
    assert code == 0
    trained = [line for line in lines if line.startswith("iteration") and "learning" in line]
    assert [int(line.split()[1]) for line in trained] == list(range(5, 106, 5))
    assert lines[-1].endswith(": finished") or lines[-1].startswith("  said:")


def test_a_log_has_every_measurement_of_every_seed_once(tmp_path: Path) -> None:
    run, out = write_seeds(running_run(tmp_path), finished=[], unfinished=0), io.StringIO()
    train = run / "train.tmp"

    def next_seed() -> None:
        (train / "seed-0.tmp").rename(train / "seed-0")
        write_train(train / "seed-1.tmp", iterations=45, sealed=False)

    def chosen() -> None:
        write_lines(train / "metrics.jsonl", metrics(90))
        train.rename(run / "train")
        update_record(run, status="done")

    with working(run):
        watch(run, out, acts(next_seed, chosen))
    lines = out.getvalue().splitlines()
    trained = [line for line in lines if line.startswith("iteration") and "learning" in line]
    assert [int(line.split()[1]) for line in trained] == [*range(5, 91, 5), *range(5, 46, 5)]
    assert any("seed 0" in line for line in lines) and any("seed 1" in line for line in lines)


@pytest.mark.parametrize(
    ("ended", "code"), [("done", 0), ("gate_failed", 1), ("failed", 1), ("interrupted", 1)]
)
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_an_ended_run_is_told_at_once(
    tmp_path: Path, ended: str, code: int, stream: type[io.StringIO]
) -> None:
    out = stream()
    before = sorted(tmp_path.rglob("*"))
    run = write_run(tmp_path, ended)
    before = sorted(run.rglob("*"))
    assert watch(run, out, acts()) == code
    assert run.name in out.getvalue()
    assert sorted(run.rglob("*")) == before


def test_a_run_whose_process_was_killed_ends_the_watching(tmp_path: Path) -> None:
    run, out = running_run(tmp_path), io.StringIO()
    lock = working(run)
    lock.__enter__()
    assert watch(run, out, acts(lambda: lock.__exit__(None, None, None))) == 1
    assert "its process is gone" in out.getvalue()


def test_hostile_answers_cannot_steer_the_terminal(tmp_path: Path) -> None:
    run = write_run(tmp_path, "done", HOSTILE)
    for out in (io.StringIO(), Terminal()):
        watch(run, out, acts())
        text = out.getvalue()
        assert TOKEN not in text
        assert "\x1b]" not in text and "\u202e" not in text and "\x9b" not in text


def test_no_line_of_the_picture_is_wider_than_the_terminal() -> None:
    answers = [{"messages": [{"content": "w" * 500}], "text": "t" * 500, "score": 1.0}]
    for width in (30, 80, 200):
        assert max(map(len, picture("run", "words", metrics(200), answers, width))) <= width


@given(st.lists(st.floats(-1e9, 1e9), max_size=300), st.integers(1, 60))
def test_a_trend_is_as_wide_as_there_is_room_and_rises_with_the_values(
    values: list[float], width: int
) -> None:
    bars = trend(values, width)
    assert len(bars) == min(width, len(values))
    ordered = [BARS.index(bar) for bar in trend(sorted(values), width)]
    assert ordered == sorted(ordered) and 0 not in ordered


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds nothing of a run"):
        watch(tmp_path, io.StringIO())


def test_ctrl_c_ends_the_watching_and_not_the_run(tmp_path: Path) -> None:
    run = running_run(tmp_path)
    with working(run):
        watcher = subprocess.Popen(
            [sys.executable, "-m", "mlx_ft", "watch", str(run)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert watcher.stdout is not None
        first = watcher.stdout.readline()
        time.sleep(0.2)
        watcher.send_signal(signal.SIGINT)
        out, said = watcher.communicate(timeout=20)
        assert watcher.returncode == 130
        assert first.startswith("iteration") and "the run itself goes on" in said
        assert f"next     mlx-ft watch {run}" in out
        assert os.getpid()  # it was not this process that was interrupted
