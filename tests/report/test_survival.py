"""The tables and the chart of the audit say what its file says, and nothing that it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_ft.report import curves, survival
from mlx_ft.report.html import report_html
from mlx_ft.report.tables import Table
from mlx_ft.report.terminal import result_lines
from mlx_ft.runs.document import run_document
from mlx_ft.system.files import read_json, write_json
from tests.support.run_folders import survival as audit

MakeRun = Callable[..., Path]


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_ways_stand_side_by_side_with_the_final_one_marked() -> None:
    rows = texts(survival.way_table(audit()))
    assert [row[0] for row in rows] == [
        "float16",
        "5-bit, gptq",
        *(f"{bits}-bit, rounded" for bits in (4, 5, 6, 8)),
    ]
    assert [row[1] for row in rows] == [
        "100.0 %",
        "99.6 %",
        "98.4 %",
        "99.6 %",
        "99.9 %",
        "100.0 %",
    ]
    assert rows[2][-1] == "< 0", "160 times the loss of the model: buried in noise"
    tones = [row[1].tone for row in survival.way_table(audit()).rows]
    assert tones[:2] == ["ok", "ok"] and not any(tones[2:]), "only what is exported is judged"
    below = {**audit(), "min_survival": 0.999}
    assert survival.way_table(below).rows[1][1].tone == "fail"


def test_every_adapted_layer_is_listed_and_drawn_by_its_worst_part() -> None:
    rows = texts(survival.layer_table(audit()))
    assert len(rows) == 16 and rows[0][:5] == [
        "22.self_attn.q_proj",
        "5",
        "3.3 %",
        "0.996",
        "0.040",
    ]
    drawn = survival.layer_curves(audit())
    assert [number for number, _ in drawn["5-bit, gptq"]] == list(range(22, 30))
    assert all(kept == pytest.approx(1 - 160 * 0.004) for _, kept in drawn["5-bit, gptq"])
    chart = curves.survival_curve(drawn)
    assert chart and "5-bit, gptq" in chart and "4-bit, rounded" in chart
    assert curves.survival_curve({}) is None


@pytest.mark.parametrize(
    "found", [{}, {"model": None, "layers": None}, {"model": {"ways": 3}, "layers": [1, {}]}]
)
def test_a_file_with_holes_is_shown_as_far_as_it_goes(found: dict[str, object]) -> None:
    assert survival.way_table(found).rows == () and survival.survival_rows(found) == []
    assert survival.layer_curves(found) == {}
    survival.layer_table(found)


def test_an_export_that_was_stopped_shows_its_evidence(make_run: MakeRun) -> None:
    run = make_run("gate_failed")
    (run / "export.tmp").mkdir()
    write_json(run / "export.tmp" / "survival.json", {**audit(), "survival": 0.31})
    document = run_document(run)
    assert document["export"] is None and document["survival"]["survival"] == 0.31
    assert "the final model keeps 31.0 % of what training changed" in result_lines(document)
    assert "What survived" in report_html(run)


def test_the_gguf_file_is_among_the_exported_models(done_run: Path) -> None:
    assert "export/quickstart.gguf" in report_html(done_run)
    manifest = done_run / "export" / "manifest.json"
    assert read_json(manifest)["info"]["gguf"]["kind"] == "q8_0"
