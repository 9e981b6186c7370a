"""The reader sees first what a tuned model got wrong, and equal outputs only once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlx_ft.recipe.names import COLUMNS
from mlx_ft.report.samples import SHOWN, read_suite_samples
from mlx_ft.runs.reader import ArtifactReader
from tests.support.run_folders import CATEGORIES, write_lines


def test_failures_of_the_final_model_come_first_and_every_category_is_shown(done_run: Path) -> None:
    suite = read_suite_samples(ArtifactReader(done_run))[0]
    assert suite.suite == "code_mode"
    assert suite.columns == COLUMNS
    assert len(suite.first) == SHOWN
    assert len(suite.rest) == 27 - SHOWN
    assert len({sample.id for sample in (*suite.first, *suite.rest)}) == 27
    assert [sample.passed("quantized") for sample in suite.first] == [False] + [True] * 11
    assert {sample.category for sample in suite.first} == set(CATEGORIES)


def test_columns_with_the_same_output_share_an_answer(done_run: Path) -> None:
    suite = read_suite_samples(ArtifactReader(done_run))[0]
    for sample in (*suite.first, *suite.rest):
        columns = [column for answer in sample.answers for column in answer.columns]
        assert sorted(columns) == sorted(COLUMNS)
        texts = [(answer.text, answer.score) for answer in sample.answers]
        assert len(set(texts)) == len(texts)
    assert suite.first[0].answers[0].columns == ("base", "quantized")
    assert suite.first[1].answers[1].columns == ("adapter", "fused", "quantized")


def test_a_tuned_column_that_failed_alone_comes_before_the_others(
    make_run: Callable[..., Path],
) -> None:
    run = make_run()
    rows = [
        {"id": name, "category": "c", "text": name, "score": 1.0, "failure": None}
        for name in ("a", "b", "c")
    ]
    worse = [dict(row, score=0.0, failure="prose") if row["id"] == "b" else row for row in rows]
    worst = [dict(row, score=0.5, failure="wrapper") if row["id"] == "c" else row for row in rows]
    suite = run / "eval" / "code_mode"
    for column, lines in zip(COLUMNS, (rows, worse, rows, worst), strict=True):
        write_lines(suite / f"{column}.jsonl", lines)
    samples = read_suite_samples(ArtifactReader(run))[0]
    assert [sample.id for sample in samples.first] == ["c", "b", "a"]


def test_an_unfinished_evaluation_shows_the_columns_that_are_there(
    make_run: Callable[..., Path],
) -> None:
    run = make_run()
    (run / "eval").rename(run / "eval.tmp")
    for column in ("fused", "quantized"):
        (run / "eval.tmp" / "code_mode" / f"{column}.jsonl").unlink()
    suite = read_suite_samples(ArtifactReader(run))[0]
    assert suite.columns == ("base", "adapter")
