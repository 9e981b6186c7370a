"""Gates: read strictly, judged on the number they name, and honest about what is not settled."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.evaluate.gates import described, gate_faults_of, judge, judgements_json
from mlx_ft.evaluate.paired_stats import compare_columns
from mlx_ft.evaluate.stats import summarise
from mlx_ft.recipe.gates import METRICS, Gate, GateRefused, parse_gate


def rows(scores: list[float], flags: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return [
        {
            "id": f"s{number}",
            "score": score,
            "category": "all",
            "failure": None if score == 1 else "wrong_answer",
            "weight": 1.0,
            "flags": list(flags),
        }
        for number, score in enumerate(scores)
    ]


def measured(**columns: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(results, rows) of one suite called talk."""
    results: dict[str, Any] = {name: summarise(column) for name, column in columns.items()}
    for name, against in compare_columns({"talk": columns})["talk"].items():
        results[name]["against"] = against
    return {"talk": results}, {"talk": columns}


@pytest.mark.parametrize(
    ("name", "limit", "gate"),
    [
        ("code_mode.quantized.mean", ">= 0.9", Gate("code_mode", "quantized", "mean", ">=", 0.9)),
        ("keep_talking.drop", "<=.05", Gate("keep_talking", None, "drop", "<=", 0.05)),
        ("v1.2.suite.adapter.low", "> 5e-1", Gate("v1.2.suite", "adapter", "low", ">", 0.5)),
        ("a.drop_low", "< -0.1", Gate("a", None, "drop_low", "<", -0.1)),
    ],
)
def test_a_gate_is_read(name: str, limit: str, gate: Gate) -> None:
    assert parse_gate(name, limit) == gate
    assert parse_gate(gate.name, f"{gate.operator} {gate.limit}") == gate


@pytest.mark.parametrize(
    ("name", "limit", "said"),
    [
        ("code_mode.quantized.maen", ">= 0.9", "did you mean code_mode.quantized.mean"),
        ("code_mode.quantised.mean", ">= 0.9", "did you mean code_mode.quantized.mean"),
        ("mean", ">= 0.9", "names no suite"),
        ("a.base.drop", "<= 0.1", "compares the base with itself"),
        ("a.mean", "0.9", "no limit"),
        ("a.mean", "= 0.9", "no limit"),
        ("a.mean", ">= nan", "no limit"),
        ("a.mean", ">= 90", "lies between 0 and 1"),
        ("a.mean", "> -0.1", "lies between 0 and 1"),
        ("a.drop", "<= 1.5", "lies between -1 and 1"),
    ],
)
def test_a_gate_that_cannot_be_meant_is_refused(name: str, limit: str, said: str) -> None:
    with pytest.raises(GateRefused, match=said.replace(".", r"\.")):
        parse_gate(name, limit)


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_is_a_gate_or_refused(name: str, limit: str) -> None:
    try:
        parse_gate(name, limit)
    except GateRefused as refusal:
        assert refusal.found and refusal.fix


@given(st.sampled_from([">=", "<=", ">", "<"]), st.floats(0, 1), st.floats(0, 1))
def test_a_limit_means_what_it_says(operator: str, limit: float, value: float) -> None:
    gate = Gate("a", None, "mean", operator, limit)
    if abs(value - limit) > 1e-9:
        assert gate.holds(value) == eval(f"{value!r} {operator} {limit!r}")
    assert gate.holds(limit) == ("=" in operator)
    assert not gate.holds(float("nan"))


def test_every_metric_is_measured() -> None:
    results, answers = measured(
        base=rows([1.0] * 20), quantized=rows([1.0] * 15 + [0.5, 0, 0, 0, 0], ("loop", "cut"))
    )
    gates = [Gate("talk", None, metric, "<=", 1.0) for metric in METRICS]
    found = {each.metric: each for each in judge(gates, {}, results, answers)}
    values = {name: each.measured for name, each in found.items()}
    assert values["mean"] == pytest.approx(15.5 / 20) and values["pass_rate"] == 0.75
    assert values["drop"] == pytest.approx(4.5 / 20)
    assert values["drop_low"] < values["drop"] < values["drop_high"]
    assert values["low"] == results["talk"]["quantized"]["low"]
    assert (values["loop_rate"], values["degenerate_rate"], values["cut_rate"]) == (1, 1, 1)
    assert values["empty_rate"] == 0
    assert {each.column for each in found.values()} == {"quantized"}


def test_the_number_decides_and_the_interval_says_how_sure_that_is() -> None:
    results, answers = measured(base=rows([0.0] * 27), quantized=rows([1.0] * 25 + [0.0] * 2))
    (near, far, fails) = judge(
        [
            Gate("talk", "quantized", "mean", ">=", 0.9),
            Gate("talk", "quantized", "mean", ">=", 0.5),
            Gate("talk", "quantized", "low", ">=", 0.9),
        ],
        {},
        results,
        answers,
    )
    assert (near.passed, near.settled) == (True, False)
    assert (far.passed, far.settled) == (True, True)
    assert not fails.passed and fails.failed == ("s25", "s26")
    (fault,) = gate_faults_of([near, far, fails])
    assert "talk.quantized.low is 0.7" in fault.found and ">= 0.9 wanted" in fault.found
    assert "27 prompts" in fault.found and "s25, s26" in fault.fix


@pytest.mark.parametrize(
    ("lost", "of", "passed", "settled"),
    [(0, 120, True, True), (8, 120, True, False), (20, 120, True, False), (30, 120, False, True)],
)
def test_a_margin_stops_a_run_only_where_the_loss_is_proven(
    lost: int, of: int, passed: bool, settled: bool
) -> None:
    results, answers = measured(
        base=rows([1.0] * of),
        adapter=rows([1.0] * of),
        quantized=rows([0.0] * lost + [1.0] * (of - lost)),
    )
    (found,) = judge([], {"talk": 0.1}, results, answers)
    assert (found.passed, found.settled, found.column) == (passed, settled, "quantized")
    assert found.asked_by == "margin" and found.measured == pytest.approx(lost / of)
    said = described(judgements_json([found])[0])
    assert ("not proven" in said) == (passed and not settled)


def test_what_the_base_got_right_is_shown_first() -> None:
    results, answers = measured(
        base=rows([0.0, 0.0, 1.0, 1.0]), quantized=rows([0.0, 0.0, 0.0, 0.0])
    )
    (found,) = judge([Gate("talk", None, "mean", ">", 0.5)], {}, results, answers)
    assert found.failed[:2] == ("s2", "s3")


def test_a_gate_on_the_drop_takes_the_place_of_the_margin_and_no_base_means_no_margin() -> None:
    results, answers = measured(base=rows([1.0] * 30), fused=rows([0.0] * 30))
    (found,) = judge([Gate("talk", None, "drop", "<=", 1.0)], {"talk": 0.1}, results, answers)
    assert found.passed and found.asked_by == "recipe"
    results, answers = measured(fused=rows([0.0] * 30))
    assert judge([], {"talk": 0.1}, results, answers) == []
    results, answers = measured(base=rows([0.0] * 30))
    assert judge([], {"talk": 0.1}, results, answers) == []
