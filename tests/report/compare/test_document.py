"""Comparisons hold what differs and nothing else, of runs in any state, in every format."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from mlx_ft.errors import RunError
from mlx_ft.report.compare.document import compare, form_of, write_comparison
from mlx_ft.report.compare.formats import WRITERS
from mlx_ft.report.compare.names import FORMATS, Format
from mlx_ft.system.files import write_json
from tests.support.experiments import write_experiment
from tests.support.run_folders import HOSTILE, TOKEN, metrics, survival, write_run

TEXT = HOSTILE.replace("\ud800", "")  # no file of ours can hold half a character


@pytest.fixture(scope="module")
def experiments(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs as experimenters make them: more rows, then another schedule and more epochs."""
    folder = tmp_path_factory.mktemp("experiments")
    first = {"train.epochs": 1, "train.lr_schedule.name": "cosine"}
    restarts = {"train.epochs": 2, "train.lr_schedule.name": "cosine_with_restarts"}
    return [
        write_experiment(folder, "exp1", first, 1.088, 5000, wrong=12),
        write_experiment(folder, "exp2", first, 1.004, 20_000, wrong=11),
        write_experiment(folder, "exp3", restarts, 0.963, 20_000, wrong=1),
    ]


def test_three_experiments_give_the_table_that_one_would_write_by_hand(
    experiments: list[Path],
) -> None:
    text = WRITERS["markdown"](compare(experiments))
    table = [line for line in text.splitlines() if line.startswith("|")][:5]
    assert table == [
        "| run | training rows | epochs | lr\\_schedule name | validation loss | change from "
        "baseline |",
        "| --- | ---: | --- | --- | ---: | ---: |",
        "| exp1-0a1b2c3d | 5,000 | 1 | cosine | 1.088 | baseline |",
        "| exp2-0a1b2c3d | 20,000 | 1 | cosine | 1.004 | -0.084 |",
        "| exp3-0a1b2c3d | 20,000 | 2 | cosine\\_with\\_restarts | **0.963** | -0.125 |",
    ]


def test_only_what_differs_is_listed_with_where_it_came_from(experiments: list[Path]) -> None:
    changes = {change["key"]: change["values"] for change in compare(experiments)["changes"]}
    assert set(changes) == {"train.epochs", "train.lr_schedule.name"}
    assert [cell["value"] for cell in changes["train.epochs"]] == [1, 1, 2]
    assert {cell["origin"] for cell in changes["train.epochs"]} == {"--set"}
    assert compare(experiments[:1])["changes"] == []


def test_scores_are_judged_prompt_by_prompt_against_the_first_run(experiments: list[Path]) -> None:
    first, second, third = compare(experiments)["runs"]
    assert first["scores"]["code_mode"]["quantized"]["paired"] is None
    one_won = second["scores"]["code_mode"]["quantized"]["paired"]
    eleven_won = third["scores"]["code_mode"]["quantized"]["paired"]
    assert (one_won["wins"], one_won["losses"]) == (1, 0)
    assert one_won["verdict"] == "cannot tell" and one_won["more_prompts"] > 27
    assert (eleven_won["wins"], eleven_won["verdict"]) == (11, "better")
    assert eleven_won["difference"] == pytest.approx(11 / 27)
    assert 0 < eleven_won["low"] < 11 / 27 < eleven_won["high"] < 1
    assert eleven_won["p_holm"] == pytest.approx(2 * eleven_won["p"])  # two suites were asked
    text = WRITERS["text"](compare(experiments))
    assert "cannot tell" in text and f"about {one_won['more_prompts']} more would" in text


def test_survival_is_told_of_every_run_that_was_audited(
    experiments: list[Path], tmp_path: Path
) -> None:
    """Also of one that a gate stopped: its audit is in the folder that was never finished."""
    run = write_run(tmp_path, "gate_failed")
    noise = survival() | {"bits": 4, "survival": -0.5}
    noise["model"]["ways"]["quantized"]["survival"] = -0.5
    noise["model"]["ways"]["fused"]["survival"] = None
    (run / "export.tmp").mkdir()
    write_json(run / "export.tmp" / "survival.json", noise)
    text = WRITERS["markdown"](compare([*experiments[:1], run]))
    rows = [line for line in text.splitlines() if "-bit, gptq" in line]
    assert [row.split(" | ")[1:] for row in rows] == [
        ["100.0 % (float16)", "99.6 % (5-bit, gptq)", "90.0 % |"],
        ["- (float16)", "\\< 0 (4-bit, gptq)", "90.0 % |"],
    ]


def test_another_scorer_is_not_paired_and_that_is_said(
    experiments: list[Path], tmp_path: Path
) -> None:
    other = shutil.copytree(experiments[1], tmp_path / experiments[1].name)
    path = other / "eval" / "results.json"
    stored = json.loads(path.read_text())
    stored["suite_info"]["code_mode"]["scorer"] = "exact"
    path.write_text(json.dumps(stored))
    _, second = compare([experiments[0], other])["runs"]
    assert second["scores"]["code_mode"]["quantized"]["paired"] is None
    assert second["scores"]["keep_talking"]["quantized"]["paired"] is not None
    assert any("code_mode is scored otherwise" in note for note in second["notes"])


def test_an_unfinished_run_is_compared_by_what_it_has_measured(
    experiments: list[Path], tmp_path: Path
) -> None:
    """As after an interruption: the base's answers are there, the evaluation is not complete."""
    run = write_run(tmp_path, "interrupted")
    shutil.copytree(experiments[0] / "eval", run / "eval.tmp")
    results = json.loads((run / "eval.tmp" / "results.json").read_text())
    results["suites"] = {
        suite: {"base": columns["base"]} for suite, columns in results["suites"].items()
    }
    write_json(run / "eval.tmp" / "results.json", results)
    for first, second in ((experiments[0], run), (run, experiments[0])):
        entries = compare([first, second])["runs"]
        assert not any("otherwise" in note for entry in entries for note in entry["notes"])
        judged = entries[1]["scores"]["code_mode"]["base"]["paired"]
        assert (judged["n"], judged["difference"]) == (27, 0)
    told = [line["seconds"] for line in metrics(90) if line["kind"] == "train"]
    assert compare([run])["runs"][0]["train_seconds"] == told[-1]


@pytest.mark.parametrize("form", FORMATS)
def test_runs_in_any_state_are_compared_with_what_they_have(
    experiments: list[Path], tmp_path: Path, form: Format
) -> None:
    endings = ("gate_failed", "interrupted", "failed")
    others = [write_run(tmp_path / ended, ended) for ended in endings]
    empty = tmp_path / "empty"
    empty.mkdir()
    write_json(empty / "run.json", {})
    comparison = compare([experiments[0], *others, empty])
    text = WRITERS[form](comparison)
    assert "nan" not in text.lower().split()
    notes = "\n".join(note for run in comparison["runs"] for note in run["notes"])
    assert notes.count("no evaluation") == 4
    assert "stopped by a gate: look before merge" in notes
    assert "train.jsonl:118: not valid JSON" in notes
    assert notes.count("no training metrics") == 2
    assert comparison["same_validation_rows"]


@pytest.mark.parametrize("form", FORMATS)
def test_hostile_texts_and_a_planted_token_reach_no_format(
    tmp_path: Path, experiments: list[Path], form: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    sets = {"data.path": TEXT, "train.optimizer": "=cmd|' /C calc'!A0", "model": TOKEN}
    bad = write_experiment(tmp_path, "bad", sets, 1.0, 10)
    text = WRITERS[form](compare([experiments[0], bad]))
    assert TOKEN not in text
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    if form == "html":
        assert "<script" not in text and "onerror=alert(2)>" not in text
        assert WRITERS[form](compare([experiments[0], bad])) == text
    if form == "csv":
        assert not any(
            cell.startswith(("=", "@")) for row in csv.reader(io.StringIO(text)) for cell in row
        )
    if form == "markdown":
        assert "<img" not in text.replace("\\<", "")


def test_every_format_that_the_command_line_names_is_written() -> None:
    assert tuple(WRITERS) == FORMATS


def test_csv_and_json_hold_the_same_numbers(experiments: list[Path]) -> None:
    comparison = compare(experiments)
    rows = list(csv.DictReader(io.StringIO(WRITERS["csv"](comparison))))
    document = json.loads(WRITERS["json"](comparison))
    for row, run in zip(rows, document["runs"], strict=True):
        assert row["run"] == run["run"]
        assert float(row["loss.validation"]) == run["losses"]["validation"]
        assert (
            float(row["code_mode.quantized.mean"])
            == (run["scores"]["code_mode"]["quantized"]["mean"])
        )


def test_a_run_given_twice_and_a_folder_without_one_are_told_together(
    experiments: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(RunError) as raised:
        compare([experiments[0], experiments[0], tmp_path / "nothing"])
    assert [fault.found for fault in raised.value.faults] == ["is given twice", "no such folder"]


def test_the_output_has_the_format_of_its_ending_and_appears_whole(
    experiments: list[Path], tmp_path: Path
) -> None:
    comparison = compare(experiments)
    forms: dict[str, Format] = {
        ".md": "markdown",
        ".html": "html",
        ".csv": "csv",
        ".log": "text",
    }
    for ending, form in forms.items():
        path = tmp_path / f"c{ending}"
        assert form_of(None, path) is WRITERS[form]
        write_comparison(path, form_of(None, path)(comparison))
        assert path.read_text() == WRITERS[form](comparison)
    assert form_of("json", tmp_path / "c.md") is WRITERS["json"]
    with pytest.raises(RunError, match="cannot be written"):
        write_comparison(tmp_path / "no" / "c.md", "x")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".html", ".log", ".md"]
