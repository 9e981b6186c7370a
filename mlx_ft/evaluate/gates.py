"""Judge measured results by the recipe's gates and the suites' margins. The only place that does.

Does: compare measured numbers with limits, and say how sure that is. Does not: read recipes, or
measure.

A gate compares the number that it names, a point estimate: a gate `>= 0.9` holds at 0.91. The
interval says whether that is `settled`, or whether too few prompts were asked to know. For a gate
on the end of the interval itself, the recipe names `low`, `drop_low` or `drop_high`.

A suite's own margin stops a run only where the loss is proven: when the whole interval of the
paired difference lies beyond it. A loss that is not proven may still be one, so the text says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from mlx_ft.errors import Fault
from mlx_ft.evaluate.suites import Suite
from mlx_ft.recipe.gates import AGAINST_BASE, METRICS, Gate
from mlx_ft.recipe.names import COLUMNS
from mlx_ft.text.suggestions import suggestion

SHOWN_SAMPLES = 5
MARGIN = "margin"


@dataclass(frozen=True)
class Judgement:
    """Result of one gate or margin.

    gate, suite, column, metric, limit: the gate, in its parts
    asked_by: `recipe`, or `margin` for a suite's own margin
    measured: the number compared with the limit
    low, high: ends of its 95 % interval (None: it has none)
    n: number of prompts
    passed: the limit is kept
    settled: the whole interval is on one side of the limit
    failed: ids of samples without the full score, those that the base got right first
    """

    gate: str
    suite: str
    column: str
    metric: str
    limit: str
    asked_by: str
    measured: float
    low: float | None
    high: float | None
    n: int
    passed: bool
    settled: bool
    failed: tuple[str, ...]


def gate_faults(
    gates: Sequence[Gate], suites: Sequence[Suite], where: Mapping[str, str]
) -> list[Fault]:
    """Return a fault for every gate on a suite that is not measured.

    where: gate -> its place in the recipe
    """
    names = [suite.name for suite in suites]
    faults = []
    for gate in gates:
        if gate.suite in names:
            continue
        known = f"the recipe measures {', '.join(names)}" if names else "name it in eval.suites"
        place = where.get(gate.name, "recipe")
        found = f"no suite {gate.suite!r} is measured"
        fix = suggestion(gate.suite, names, known, written=partial(_on_suite, gate))
        faults.append(Fault(f"{place} eval.gates.{gate.name}", found, fix))
    return faults


def _on_suite(gate: Gate, suite: str) -> str:
    """Return the name of the same gate on another suite."""
    return gate.name.replace(gate.suite, suite, 1)


def judge(
    gates: Sequence[Gate],
    margins: Mapping[str, float],
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
    rows: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
) -> list[Judgement]:
    """Judge the gates, then the margins of suites whose drop no gate is on.

    results: suite -> column -> summary
    rows: suite -> column -> lines of the sample log

    A margin needs the base and another column; without them it is left out.
    """
    judged = [_judge_gate(gate, results, rows) for gate in gates]
    taken = {gate.suite for gate in gates if gate.is_against_base}
    for suite, margin in margins.items():
        column = _last(results[suite])
        if suite in taken or column == "base" or "base" not in results[suite]:
            continue
        drop = Gate(suite, column, "drop", "<=", margin)
        measured, low, high = _measured(drop, column, results[suite])
        assert low is not None and high is not None
        judged.append(
            _judgement(
                drop,
                column,
                (measured, low, high),
                results[suite][column]["n"],
                passed=low <= margin + 1e-9,
                asked_by=MARGIN,
                failed=_failed(rows[suite], column),
            )
        )
    return judged


def _judge_gate(
    gate: Gate,
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
    rows: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
) -> Judgement:
    columns = results[gate.suite]
    column = gate.column or _last(columns)
    found = _measured(gate, column, columns)
    return _judgement(
        gate,
        column,
        found,
        columns[column]["n"],
        passed=gate.holds(found[0]),
        asked_by="recipe",
        failed=_failed(rows[gate.suite], column),
    )


def _last(columns: Mapping[str, Any]) -> str:
    """Return the column of the model that is delivered, in any order of asking."""
    known: list[str] = [name for name in COLUMNS if name in columns]
    return (known or list(columns))[-1]


def _measured(
    gate: Gate, column: str, columns: Mapping[str, Mapping[str, Any]]
) -> tuple[float, float | None, float | None]:
    """Return the number that a gate names, and the ends of its interval (None: it has none)."""
    assert gate.metric in METRICS
    summary = columns[column]
    if gate.metric in AGAINST_BASE:
        against = summary["against"]["base"]
        low, high = -against["high"], -against["low"]
        ends = {"drop_low": low, "drop_high": high}
        if gate.metric in ends:
            return ends[gate.metric], None, None
        return -against["difference"], low, high
    if gate.metric == "low":
        return summary["low"], None, None
    if gate.metric == "mean":
        return summary["mean"], summary["low"], summary["high"]
    if gate.metric == "pass_rate":
        return summary["passed"] / summary["n"], None, None
    sign = gate.metric.removesuffix("_rate")
    rate = summary["degenerate"]["any" if sign == "degenerate" else sign]
    return rate["rate"], rate["low"], rate["high"]


def _judgement(
    gate: Gate,
    column: str,
    found: tuple[float, float | None, float | None],
    n: int,
    *,
    passed: bool,
    asked_by: str,
    failed: tuple[str, ...],
) -> Judgement:
    measured, low, high = found
    ends = [end for end in (low, high) if end is not None]
    return Judgement(
        gate=gate.name,
        suite=gate.suite,
        column=column,
        metric=gate.metric,
        limit=f"{gate.operator} {gate.limit:g}",
        asked_by=asked_by,
        measured=measured,
        low=low,
        high=high,
        n=n,
        passed=passed,
        settled=all(gate.holds(end) == gate.holds(measured) for end in ends),
        failed=() if passed else failed,
    )


def _failed(rows: Mapping[str, Sequence[Mapping[str, Any]]], column: str) -> tuple[str, ...]:
    """Return ids of samples without the full score, the greatest loss against the base first."""
    base = {row["id"]: row["score"] for row in rows.get("base", ())}
    lost = [row for row in rows[column] if row["score"] < 1]
    lost.sort(key=lambda row: row["score"] - base.get(row["id"], 0.0))
    return tuple(str(row["id"]) for row in lost[:SHOWN_SAMPLES])


def judgements_json(judged: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Return the judgements as they stand in results.json."""
    return [{**asdict(each), "failed": list(each.failed)} for each in judged]


def described(judged: Mapping[str, Any]) -> str:
    """Return one judgement, given as plain JSON, in words: the number, its limit, how sure."""
    interval = ""
    if judged["low"] is not None:
        interval = f" (95 %: {judged['low']:.3f} to {judged['high']:.3f})"
    name = f"{judged['suite']}.{judged['column']}.{judged['metric']}"
    text = f"{name} is {judged['measured']:.3f}{interval}, {judged['limit']} wanted"
    text += f", {judged['n']} prompts"
    if judged["asked_by"] == MARGIN and judged["passed"] and not judged["settled"]:
        return f"{text}: not proven to be lost, nor to be kept"
    return text if judged["settled"] else f"{text}: too few to settle it"


def gate_faults_of(judged: Sequence[Judgement]) -> list[Fault]:
    """Return a fault for every gate that did not hold, with the samples that failed."""
    return [
        Fault(
            f"gate {each.gate}",
            described(judgements_json([each])[0]),
            f"look at {', '.join(each.failed)} in the report" if each.failed else "see the report",
        )
        for each in judged
        if not each.passed
    ]
