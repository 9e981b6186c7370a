"""Outcomes are counted once each, in the order that a reader looks for them."""

from __future__ import annotations

from pathlib import Path

from mlx_ft.report.failures import confusion_table, lint_table
from mlx_ft.report.samples import SuiteSamples, read_suite_samples
from mlx_ft.runs.reader import ArtifactReader


def suites(run: Path) -> dict[str, SuiteSamples]:
    return {each.suite: each for each in read_suite_samples(ArtifactReader(run))}


def test_the_confusion_of_a_run_counts_every_sample_once(done_run: Path) -> None:
    table = confusion_table(suites(done_run)["code_mode"])
    assert table is not None
    assert [cell.text for cell in table.head] == ["outcome", "right", "prose"]
    rows = [[cell.text for cell in row] for row in table.rows]
    assert rows == [["prose", "26", "1"]]
    assert table.rows[0][1].tone == "ok"
    talk = confusion_table(suites(done_run)["keep_talking"])
    assert talk is not None
    counts = [int(cell.text) for row in talk.rows for cell in row[1:] if cell.text != "-"]
    assert sum(counts) == 32


def test_a_loss_is_marked_as_one_and_a_single_column_has_no_confusion(done_run: Path) -> None:
    talk = confusion_table(suites(done_run)["keep_talking"])
    assert talk is not None
    right = next(row for row in talk.rows if row[0].text == "right")
    assert right[2].tone == "fail"
    alone = SuiteSamples("s", ("base",), (), ())
    assert confusion_table(alone) is None


def test_lint_hits_become_rows_and_none_no_table() -> None:
    hit = {
        "rule": "cut",
        "severity": "fail",
        "count": 12,
        "lines": list(range(1, 13)),
        "found": "answers end with ...",
        "fix": "complete them",
    }
    table = lint_table({"lint": [hit]})
    assert table is not None
    assert [cell.text for cell in table.rows[0]] == [
        "cut",
        "fail",
        "12",
        "answers end with ...",
        "1, 2, 3, 4, 5, 6, 7, 8, ...",
        "complete them",
    ]
    assert lint_table({"lint": []}) is None
    assert lint_table({}) is None
