"""Charts are inline elements: reproducible, themable, free of scripts and outside references."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.report import curves
from mlx_ft.runs.document import run_document
from mlx_ft.text.safe import clean
from tests.support.run_folders import HOSTILE, metrics


def all_charts(document: dict[str, Any]) -> dict[str, str | None]:
    return {
        "loss": curves.loss_curve(document["train"]["metrics"]),
        "rate": curves.learning_rate_curve(document["train"]["metrics"]),
        "bars": curves.score_bars("suite-1", document["eval"]["code_mode"]),
        "lengths": curves.length_histogram(document["data"]["splits"]["train"]),
    }


@pytest.fixture(scope="module")
def charts(done_run: Path) -> dict[str, str | None]:
    return all_charts(run_document(done_run))


def test_charts_are_well_formed_and_refer_to_nothing_outside(charts: dict[str, str | None]) -> None:
    for svg in charts.values():
        assert svg is not None
        root = ElementTree.fromstring(svg)
        assert root.tag == "svg"
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert not re.search(
            r"http|<script|<style|<image|<!--|<\?xml|#0[1-6]0[1-6]0[1-6]|font-fam", svg
        )
        assert len(svg) < 40_000
        texts = ["".join(element.itertext()) for element in root.iter("text")]
        assert texts, "text stays text"


def test_ids_are_unique_on_a_page_and_every_reference_has_its_id(
    charts: dict[str, str | None],
) -> None:
    page = "".join(svg or "" for svg in charts.values())
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', page)) == set(ids)


def test_the_same_input_gives_the_same_bytes_whatever_the_users_matplotlib_settings(
    done_run: Path, charts: dict[str, str | None]
) -> None:
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        assert all_charts(run_document(done_run)) == charts
        assert dict(matplotlib.rcParams) == before


def test_without_points_there_is_no_chart() -> None:
    assert curves.loss_curve([]) is None
    assert curves.loss_curve([{"kind": "train", "iteration": 1, "loss": None}]) is None
    assert curves.learning_rate_curve([{"kind": "validation", "iteration": 1, "loss": 1.0}]) is None
    assert curves.score_bars("s", {}) is None
    assert curves.length_histogram({}) is None
    assert curves.length_histogram({"histogram": {"edges": [1], "counts": [2]}}) is None


def test_the_loss_axis_is_logarithmic_only_for_a_wide_range() -> None:
    def lines(low: float) -> list[dict[str, Any]]:
        pairs = ((1, 3.0), (2, low))
        return [{"kind": "train", "iteration": i, "loss": loss} for i, loss in pairs]

    assert "logarithmic" in (curves.loss_curve(lines(0.01)) or "")
    assert "logarithmic" not in (curves.loss_curve(lines(0.5)) or "logarithmic")
    assert "logarithmic" not in (curves.loss_curve(lines(0.0)) or "logarithmic")


def test_one_point_and_values_that_are_not_finite_still_give_a_chart() -> None:
    lines = [
        {"kind": "train", "iteration": 1, "loss": 2.0, "learning_rate": 0.0},
        {"kind": "train", "iteration": 2, "loss": None, "learning_rate": 0.0},
    ]
    assert curves.loss_curve(lines)
    assert curves.learning_rate_curve(lines)


def test_a_long_curve_is_averaged_says_so_and_keeps_its_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    fewer, grouped = curves.averaged(points)
    assert grouped == 25
    assert len(fewer) == curves.MAX_POINTS
    assert sum(y for _, y in fewer) / 400 == pytest.approx(sum(y for _, y in points) / 10_000)
    long = [dict(line, iteration=i) for i, line in enumerate(metrics(240) * 40)]
    assert "mean of 5 reports" in (curves.loss_curve(long) or "")


@pytest.mark.parametrize(
    "name", [clean(HOSTILE), HOSTILE, "$\\frac{", "日本語", "-->", ' id="x"', ""]
)
def test_a_hostile_category_is_text_and_nothing_else(name: str) -> None:
    result = {"mean": 0.5, "n": 2, "low": 0.1, "high": 0.9, "failures": {}}
    svg = curves.score_bars("s", {"base": {**result, "by_category": {name: result}}})
    assert svg is not None
    root = ElementTree.fromstring(svg)
    assert not [e for e in root.iter() if e.tag in ("script", "img", "a")]
    shown = clean(name).split()[:1]
    assert not shown or any(shown[0][:12] in (e.text or "") for e in root.iter("text"))


@given(st.lists(st.floats(-100, 100), min_size=20, max_size=300))
def test_a_smoothed_curve_stays_between_the_lowest_and_the_highest_value(
    values: list[float],
) -> None:
    smooth = curves.smoothed(values)
    assert len(smooth) == len(values)
    assert all(min(values) - 1e-9 <= value <= max(values) + 1e-9 for value in smooth)
    assert smooth[0] == pytest.approx(values[0])


def test_a_constant_curve_is_its_own_smoothed_one_and_a_short_one_has_none() -> None:
    assert curves.smoothed([3.0] * 40) == pytest.approx([3.0] * 40)
    assert curves.smoothed([3.0] * 19) == []
