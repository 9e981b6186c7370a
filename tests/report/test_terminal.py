"""The terminal gets the verdict, the tables and the next step, as plain ASCII text."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_ft.report.terminal import result_lines
from mlx_ft.runs.document import run_document
from mlx_ft.runs.folder import update_record
from tests.support.run_folders import HOSTILE, TOKEN, write_mismatch

MakeRun = Callable[..., Path]


def test_a_done_run_shows_scores_sizes_checks_times_and_the_next_step(done_run: Path) -> None:
    text = result_lines(run_document(done_run), Path("runs/quickstart-0a1b2c3d"))
    for line in (
        "quickstart-0a1b2c3d: Done",
        "code_mode 0.00 -> 0.96, keep_talking 0.97 -> 0.94 (base to quantized)",
        "wrong outputs, quantized: prose 1",
        "train    240 iterations (120 updates), validation loss 2.741 -> 0.0623, 2 min 51 s",
        "fused 271 MB (export/fused-f16), quantized 93.4 MB (export/q5), GGUF 145 MB (export/quick",
        "* the final model keeps 99.6 % of what training changed, at least 90.0 % wanted",
        "verified 3 of 3 export checks",
        "checks   2 ok, 1 warn",
        "time     4 min 55 s (data 3.20 s",
        "report   runs/quickstart-0a1b2c3d/report.html",
        "next     talk to the model: mlx-ft chat runs/quickstart-0a1b2c3d",
    ):
        assert line in text, line
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert rows["all"] == ["all", "32", "0.97", "0.97", "0.97", "0.94"]
    assert rows["multi_step"] == ["multi_step", "4", "0.00", "1.00", "1.00", "1.00"]
    assert text.isascii()
    assert text.endswith("\n")
    assert max(len(line) for line in text.splitlines()) <= 110


@pytest.mark.parametrize(
    ("ended", "line"),
    [
        (
            "gate_failed",
            "Stopped by a gate\n  look before merge: 2 of 5 generations are degenerate",
        ),
        ("interrupted", "train    training reached iteration 90 of 240, loss 0.1585"),
        ("failed", "train.jsonl:118: not valid JSON; training did not start"),
    ],
)
def test_other_endings_say_why_and_do_not_invent_results(
    make_run: MakeRun, ended: str, line: str
) -> None:
    text = result_lines(run_document(make_run(ended)))
    assert line in text
    assert "No evaluation: " in text
    assert "No exported model: " in text
    assert "mlx-ft chat" not in text


def test_a_run_that_was_asked_to_end_early_says_how_to_go_on(make_run: MakeRun) -> None:
    run = make_run("gate_failed")
    update_record(run, status="stopped", exit_reason="finished up to train")
    text = result_lines(run_document(run), run)
    assert "Ended early, as asked\n  finished up to train" in text
    assert "No exported model: the run was asked to end before it." in text


def test_hostile_names_cannot_steer_the_terminal(make_run: MakeRun) -> None:
    run = make_run("done", HOSTILE)
    text = result_lines(run_document(run), run)
    assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n"]
    assert TOKEN not in text


def test_a_next_command_can_be_pasted_whatever_the_folder_is_called(done_run: Path) -> None:
    text = result_lines(run_document(done_run), Path("my runs/it's"))
    assert "mlx-ft chat 'my runs/it'\"'\"'s'" in text


def test_warnings_stand_before_the_scores(make_run: MakeRun) -> None:
    run = make_run()
    assert "WARNING" not in result_lines(run_document(run))
    told = write_mismatch(run)
    text = result_lines(run_document(run))
    assert text.index(f"WARNING  {told}") < text.index("code_mode  ")
