"""The checklist passes what was recorded as passed, and what was not recorded is not done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_ft.report.checklist import FAILED, NOT_DONE, PASSED, TONES, WARNED, checklist_table
from mlx_ft.runs.document import run_document

MakeRun = Callable[..., Path]


def results(document: dict[str, Any]) -> dict[str, str]:
    return {row[0].text: row[2].text for row in checklist_table(document).rows}


def result(document: dict[str, Any], part: str) -> str:
    (found,) = [value for words, value in results(document).items() if part in words]
    return found


def test_a_done_run_passes_what_it_recorded(done_run: Path) -> None:
    document = run_document(done_run)
    found = results(document)
    assert list(found.values()).count(PASSED) == 7
    assert result(document, "adapter's size") == PASSED
    assert result(document, "own scores") == PASSED
    assert result(document, "one token") == NOT_DONE  # the run did not record it


@pytest.mark.parametrize(("ended", "look"), [("gate_failed", FAILED), ("interrupted", NOT_DONE)])
def test_what_a_run_did_not_come_to_is_not_done(make_run: MakeRun, ended: str, look: str) -> None:
    document = run_document(make_run(ended))
    assert result(document, "before anything was merged") == look
    for part in ("re-quantized", "bits or more", "was evaluated", "not forgotten", "own scores"):
        assert result(document, part) == NOT_DONE


def test_each_bad_record_turns_its_own_answer_and_no_other(done_run: Path) -> None:
    good = run_document(done_run)
    document = run_document(done_run)
    document["export"]["quantized"]["bits"] = 4
    document["export"]["checks"][0]["ok"] = False
    document["eval"]["keep_talking"]["quantized"] |= {"mean": 0.3, "high": 0.4}
    document["preflight"]["findings"][0]["level"] = "warn"
    changed = results(document)
    turned = {words for words, value in results(good).items() if changed[words] != value}
    assert len(turned) == 4
    assert result(document, "bits or more") == WARNED
    assert result(document, "re-quantized") == FAILED
    assert result(document, "not forgotten") == FAILED
    assert result(document, "adapter's size") == WARNED


def test_every_result_has_a_tone(make_run: MakeRun) -> None:
    for ended in ("done", "gate_failed", "interrupted", "failed"):
        table = checklist_table(run_document(make_run(ended, name=ended)))
        assert all(row[2].tone == TONES[row[2].text] for row in table.rows)
