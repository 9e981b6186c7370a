"""The document has fixed, documented keys; missing is null; a broken file is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_ft.errors import RunError
from mlx_ft.report.verdict import verdict
from mlx_ft.runs.document import SCHEMA_KEYS, document_json, run_document
from tests.support.run_folders import HOSTILE, TOKEN, metrics, write_seeds

MakeRun = Callable[..., Path]
TOP_LEVEL = (
    "schema run status recipe model data preflight train export survival eval gates warnings "
    "columns timings environment"
)


def paths(value: Any, at: str = "") -> Iterator[str]:
    """Dotted paths of every key; lists are not entered."""
    if isinstance(value, dict):
        for key, entry in value.items():
            path = f"{at}.{key}" if at else key
            yield path
            yield from paths(entry, path)


def documented(path: str) -> bool:
    """Whether a path, something that it lies in, or something inside of it is in SCHEMA_KEYS."""
    parts = path.split(".")
    return any(
        all(name.startswith("<") or name == part for part, name in zip(parts, names, strict=False))
        for names in (key.split(".") for key in SCHEMA_KEYS)
    )


def test_top_level_keys_are_exactly_these_and_every_key_is_documented(done_run: Path) -> None:
    document = run_document(done_run)
    assert list(document) == TOP_LEVEL.split()
    assert [path for path in paths(document) if not documented(path)] == []
    assert not documented("timings.stages.train.unheard_of")


def test_every_column_of_an_evaluation_has_its_mean_interval_and_failures(done_run: Path) -> None:
    document = run_document(done_run)
    for suite in ("code_mode", "keep_talking"):
        for column in ("base", "adapter", "fused", "quantized"):
            result = document["eval"][suite][column]
            assert {"mean", "n", "low", "high", "by_category", "failures"} <= set(result)
            assert result["low"] <= result["mean"] <= result["high"]
    assert document["recipe"]["origins"]["train.seed"] == "--set"
    assert document["recipe"]["values"]["train"]["seed"] == 1
    assert document["train"]["metrics"] == metrics(240)


@pytest.mark.parametrize(
    ("ended", "missing"),
    [
        ("failed", ["data", "preflight", "train", "export", "survival", "eval"]),
        ("interrupted", ["export", "survival", "eval"]),
        ("gate_failed", ["export", "survival", "eval"]),
        ("done", []),
    ],
)
def test_missing_stages_are_null_and_nothing_else_is(
    make_run: MakeRun, ended: str, missing: list[str]
) -> None:
    document = run_document(make_run(ended))
    assert [key for key, value in document.items() if value is None] == missing
    assert document["status"] == ended


def test_an_interrupted_training_shows_the_whole_lines_so_far(make_run: MakeRun) -> None:
    document = run_document(make_run("interrupted"))
    assert document["train"]["info"] is None
    assert document["train"]["metrics"] == metrics(90)
    assert document["timings"]["stages"]["train"]["state"] == "unfinished"


@pytest.mark.parametrize(
    ("finished", "unfinished", "iterations", "words"),
    [
        ((), 0, 90, "0 of 3 seeds trained; seed 0 reached iteration 90 of 240, loss"),
        ((0,), 1, 90, "1 of 3 seeds trained; seed 1 reached iteration 90 of 240, loss"),
        ((0, 1), None, 240, "2 of 3 seeds trained"),
        ((), None, 0, "training did not start"),
    ],
)
def test_an_interrupted_training_of_several_seeds_shows_the_one_it_came_to(
    make_run: MakeRun,
    finished: tuple[int, ...],
    unfinished: int | None,
    iterations: int,
    words: str,
) -> None:
    document = run_document(write_seeds(make_run("interrupted"), finished, unfinished))
    assert document["train"]["metrics"] == (metrics(iterations) if iterations else [])
    assert [path for path in paths(document) if not documented(path)] == []
    assert verdict(document).evidence.startswith(words)


def test_a_stage_that_lost_a_file_is_shown_as_changed(make_run: MakeRun) -> None:
    run = make_run()
    (run / "export" / "fused-f16" / "model.safetensors").unlink()
    document = run_document(run)
    assert document["timings"]["stages"]["export"]["state"] == "changed"
    assert document["export"]["quantized"]["bits"] == 5


def test_all_broken_files_are_named_at_once_with_what_to_do(make_run: MakeRun) -> None:
    run = make_run()
    (run / "preflight.json").write_text("{")
    (run / "recipe.json").write_text("[]")
    (run / "data" / "stats.json").write_bytes(b'{"splits": "\xff"}')
    lines = (run / "train" / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:20]
    (run / "train" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "eval" / "results.json").write_text('{"suites": {"code_mode": {"base": 0.5}}}')
    with pytest.raises(RunError) as caught:
        run_document(run)
    places = {fault.where.removeprefix(f"{run}/"): fault for fault in caught.value.faults}
    assert len(places) == len(caught.value.faults)
    assert set(places) == {
        "preflight.json",
        "recipe.json",
        "data/stats.json",
        "train/metrics.jsonl:4",
        "eval/results.json",
    }
    assert all(fault.found and fault.fix for fault in places.values())
    assert str(run / "data") in places["data/stats.json"].fix


def test_a_folder_without_any_artifact_is_no_run(tmp_path: Path) -> None:
    own = tmp_path / "own"
    for name in ("data", "train", "eval"):
        (own / name).mkdir(parents=True)
    (own / "recipe.yaml").write_text("model: m\n")
    for folder in (tmp_path, own, tmp_path / "nowhere"):
        with pytest.raises(RunError, match=str(folder)):
            run_document(folder)


def test_a_single_artifact_is_enough(make_run: MakeRun) -> None:
    run = make_run()
    (run / "run.json").unlink()
    document = run_document(run)
    assert document["status"] is None
    assert document["run"] == run.name
    assert document["eval"]["code_mode"]["base"]["n"] == 27


def test_a_line_separator_inside_a_text_does_not_end_a_line(make_run: MakeRun) -> None:
    document = run_document(make_run(said="one\u2028two\x85three"))
    assert [s["text"] for s in document["train"]["samples"]] == ["one\u2028two\x85three"] * 3


def test_a_loss_that_was_not_finite_is_null_and_the_json_stays_valid(make_run: MakeRun) -> None:
    run = make_run()
    with (run / "train" / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "iteration": 245, "loss": NaN}\n')
    document = run_document(run)
    assert document["train"]["metrics"][-1]["loss"] is None
    assert json.loads(document_json(document)) == document


def test_hostile_text_is_ascii_in_the_json_and_credentials_are_not_in_it(make_run: MakeRun) -> None:
    text = document_json(run_document(make_run(said=HOSTILE)))
    assert text.isascii()
    assert not [c for c in text if ord(c) < 32 and c != "\n"]
    assert TOKEN not in text


@pytest.mark.parametrize(
    "told",
    [{"warnings": "one"}, {"warnings": [1]}, {"columns": ["base"]}, {"columns": {"base": 1}}],
)
def test_warnings_and_columns_of_another_form_are_told_not_shown(
    make_run: MakeRun, told: dict[str, Any]
) -> None:
    path = make_run() / "eval" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    with pytest.raises(RunError, match=f"{next(iter(told))} is not a"):
        run_document(path.parents[1])
