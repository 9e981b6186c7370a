"""Gates: SUITE.COLUMN.METRIC and a limit that a measured number must keep.

    eval: {gates: {code_mode.quantized.mean: ">= 0.9", keep_talking.drop: "<= 0.05"}}

Does: read and check the two texts of a gate. Does not: know the suites, or judge
(`mlx_ft/evaluate/gates.py` does).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mlx_ft.recipe.names import COLUMNS
from mlx_ft.text.suggestions import suggestion

# Metric -> what it is. The first group is of one column, the second of a column against the base.
OF_ONE: Mapping[str, str] = {
    "mean": "mean score",
    "low": "lower end of the mean's 95 % interval",
    "pass_rate": "share of prompts with the full score",
    "degenerate_rate": "share of answers that are empty, loop, or show tokens or thoughts",
    "loop_rate": "share of answers that loop",
    "empty_rate": "share of empty answers",
    "cut_rate": "share of answers that max_tokens cut",
}
AGAINST_BASE: Mapping[str, str] = {
    "drop": "mean score of the base minus that of the column",
    "drop_low": "lower end of the drop's 95 % interval: the loss that is proven",
    "drop_high": "upper end of the drop's 95 % interval: the loss that is not excluded",
}
METRICS: Mapping[str, str] = {**OF_ONE, **AGAINST_BASE}
_LIMIT = re.compile(r"\s*(>=|<=|>|<)\s*([-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Gate:
    """A measured number and its limit.

    suite: name of the suite.
    column: a column, or None for the last measured one of base, adapter, fused and quantized.
    metric: a key of METRICS.
    operator: one of >=, <=, > and <.
    limit: the limit (of a score or rate).
    """

    suite: str
    column: str | None
    metric: str
    operator: str
    limit: float

    def __str__(self) -> str:
        return f"{self.name} {self.operator} {self.limit:g}"

    @property
    def name(self) -> str:
        """The measured number, as a recipe names it."""
        return ".".join(part for part in (self.suite, self.column, self.metric) if part)

    @property
    def is_against_base(self) -> bool:
        return self.metric in AGAINST_BASE

    def holds(self, value: float) -> bool:
        """Return whether a number keeps the limit, with a tolerance of 1e-9."""
        if math.isnan(value):
            return False
        near = abs(value - self.limit) <= 1e-9
        if self.operator in (">=", "<="):
            return near or (value > self.limit) == (self.operator == ">=")
        return not near and (value > self.limit) == (self.operator == ">")


class GateRefused(ValueError):
    """A gate that cannot be read: `found` and `fix`."""

    def __init__(self, found: str, fix: str):
        self.found, self.fix = found, fix
        super().__init__(f"{found} - {fix}")


def parse_gate(name: str, limit: str) -> Gate:
    """Return the gate for a recipe's key and value. Raises GateRefused.

    The name is SUITE.COLUMN.METRIC or SUITE.METRIC. A suite's own name may have dots.
    """
    *front, metric = name.split(".")
    column = front.pop() if len(front) > 1 and front[-1] in COLUMNS else None
    if metric not in METRICS:
        before = name.split(".")[:-1]
        known = f"the metrics are {', '.join(METRICS)}"
        fix = suggestion(
            metric, METRICS, known, cutoff=0.5, written=lambda near: ".".join([*before, near])
        )
        raise GateRefused(f"{metric!r} is no metric", fix)
    if not front or not all(front):
        raise GateRefused(
            f"{name!r} names no suite",
            "write SUITE.COLUMN.METRIC, such as code_mode.quantized.mean",
        )
    if column is None and len(front) > 1:
        fix = suggestion(
            front[-1],
            COLUMNS,
            cutoff=0.7,
            written=lambda near: ".".join([*front[:-1], near, metric]),
        )
        if fix:
            raise GateRefused(f"{front[-1]!r} is no column", fix)
    suite = ".".join(front)
    if column == "base" and metric in AGAINST_BASE:
        raise GateRefused(f"{name} compares the base with itself", "name another column")
    found = _LIMIT.fullmatch(limit)
    if found is None:
        raise GateRefused(
            f"{limit!r} is no limit", 'write one of >=, <=, >, < and a number, such as ">= 0.9"'
        )
    value = float(found[2])
    low = -1.0 if metric in AGAINST_BASE else 0.0
    if not low <= value <= 1:
        raise GateRefused(f"a limit of {value:g}", f"{metric} lies between {low:g} and 1")
    return Gate(suite, column, metric, found[1], value)
