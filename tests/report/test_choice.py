"""What chose the weights, and the seeds they were chosen from, stand in every view of a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_ft.report import curves
from mlx_ft.report.html import report_html
from mlx_ft.report.terminal import result_lines
from mlx_ft.runs.document import run_document
from mlx_ft.runs.folder import read_manifest, seal
from mlx_ft.system.files import read_json, write_json
from tests.support.run_folders import HOSTILE, metrics, write_lines

# JSON files of a run are UTF-8, which has no lone surrogates.
BAD = HOSTILE.replace("\ud800", "")

MakeRun = Callable[..., Path]
SCORES = {40: 0.25, 80: 0.75, 120: 0.5, 160: 0.75, 200: 0.5, 240: 0.625}


def selections() -> list[dict[str, Any]]:
    return [
        {
            "kind": "selection",
            "iteration": iteration,
            "iterations": 240,
            "suite": "code_mode",
            "by": "mean",
            "score": score,
            "n": 24,
            "low": score - 0.1,
            "high": score + 0.1,
            "validation_loss": 0.1,
            "best_iteration": 80,
            "selections_since_best": 0,
        }
        for iteration, score in SCORES.items()
    ]


def entry(seed: int, score: float | None, reached: bool) -> dict[str, Any]:
    stopped = None if score is not None else f"look before you merge: it loops {BAD}"
    there = score is not None
    return {
        "seed": seed,
        "stopped": stopped,
        "score": score,
        "validation_loss": 0.0911 if there else None,
        "iteration": 80 if there else None,
        "iterations": 240 if there else None,
        "seconds": 171.0 if there else None,
        "reached": reached,
    }


SEEDS = {
    "chosen": 1,
    "trained": [entry(0, 0.5, False), entry(1, 0.875, True), entry(2, None, False)],
    "spread": {"measure": "score", "mean": 0.6875, "low": 0.5, "high": 0.875, "deviation": 0.2},
    "reached": {"gate": 0.8, "count": 1, "of": 3, "low": 0.0615, "high": 0.7923},
}


@pytest.fixture
def chosen_run(make_run: MakeRun) -> Path:
    run = make_run("done")
    stored = read_json(run / "recipe.json")
    stored["recipe"] |= {"hypothesis": f"seeds matter {BAD}", "expected": "0.9 or more"}
    stored["recipe"]["train"]["select"] = {"metric": None, "suite": "evals/code_mode.yaml"}
    write_json(run / "recipe.json", stored)
    manifest = read_manifest(run / "train")
    assert manifest is not None
    write_lines(run / "train" / "metrics.jsonl", [*metrics(240), *selections()])
    chosen = {
        "chosen_iteration": 80,
        "chosen_score": 0.875,
        "chosen_validation_loss": 0.0911,
        "ended_early": True,
    }
    seal(run / "train", "train", "inputs", {**manifest.info, **chosen, "seeds": SEEDS})
    return run


def test_the_terminal_says_what_was_expected_what_was_chosen_and_how_reliable_it_is(
    chosen_run: Path,
) -> None:
    text = result_lines(run_document(chosen_run), chosen_run)
    assert "expected   0.9 or more" in text and "hypothesis seeds matter" in text
    line = "chosen   weights of iteration 80 of 240 (mean 0.88, validation loss 0.0911); nothing"
    assert line in text
    assert "3 trained, 1 chosen; score 0.50 to 0.88, mean 0.69" in text
    assert (
        "1 of 3 reached 0.8 on the prompts that choose: 33" in text
        and "0.06" in text
        and "0.79" in text
    )
    assert text.isascii() and "\x1b" not in text


def test_the_page_has_the_curve_the_seeds_and_what_was_expected(chosen_run: Path) -> None:
    page = report_html(chosen_run)
    assert "chosen: iteration 80, 0.75" in page
    for word in ("seeds matter", "0.9 or more", "look before you merge: it loops", "1 of 3"):
        assert word in page
    assert "<script>" not in page


def test_without_selection_and_notes_nothing_of_it_is_there(make_run: MakeRun) -> None:
    run = make_run("done")
    text, page = result_lines(run_document(run), run), report_html(run)
    for word in ("chosen", "hypothesis", "expected "):
        assert word not in text
    assert "choose the weights" not in page and "Seeds:" not in page
    shutil.rmtree(run)


def test_scores_are_no_losses(chosen_run: Path) -> None:
    """Lines of another kind must not become points of the loss curve."""
    lines = run_document(chosen_run)["train"]["metrics"]
    plain = [line for line in lines if line["kind"] != "selection"]
    assert curves.loss_curve(lines) == curves.loss_curve(plain)
    assert curves.selection_curve(plain) is None
    skipped = {"kind": "skipped", "iteration": 60, "loss": 99.0}
    assert curves.loss_curve([*plain, skipped]) == curves.loss_curve(plain)
