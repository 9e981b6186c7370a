"""The `eval` section of a recipe, and the checks between its keys.

Does not: read suites or evaluate.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from mlx_ft.recipe.cli_defaults import DEFAULT_BATCH_SIZE
from mlx_ft.recipe.fields import Conflict, Section, Text, Whole
from mlx_ft.recipe.gates import Gate, GateRefused, parse_gate
from mlx_ft.recipe.names import COLUMNS, ColumnName


def _limit_text(value: object) -> object:
    """Return a bare number as text, so that it is refused as a limit, beside other limits."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


class EvalRecipe(Section):
    """The measurement at the end."""

    suites: list[Text] = Field(
        default_factory=list, description="Suite files, relative to the current folder."
    )
    columns: list[ColumnName] = Field(
        default_factory=lambda: list(COLUMNS),
        min_length=1,
        description="Models to measure, side by side.",
    )
    limit: Whole | None = Field(
        None,
        ge=1,
        description="Prompts of each suite that are asked, from its beginning. Null: all of them.",
    )
    batch_size: Whole = Field(DEFAULT_BATCH_SIZE, ge=1, description="Prompts generated at a time.")
    gates: dict[Text, Annotated[str, BeforeValidator(_limit_text)]] = Field(
        default_factory=dict,
        description="Limits that a measured number must keep, or the run ends with exit code 1: "
        '`{code_mode.quantized.mean: ">= 0.9", keep_talking.drop: "<= 0.05"}`. Without a column it '
        "is the last one that is measured; the metrics are in the table of gates below.",
    )

    def parsed_gates(self) -> list[Gate]:
        """Return the gates. Those of a loaded recipe can all be read."""
        return [parse_gate(name, limit) for name, limit in self.gates.items()]

    def conflicts(self) -> list[Conflict]:
        """Return a conflict for every list that names something twice, and for every gate."""
        lists: dict[str, list[str]] = {"suites": self.suites, "columns": [*self.columns]}
        found = [
            Conflict((f"eval.{key}",), f"{twice[0]} is given twice", "name it once")
            for key, names in lists.items()
            if (twice := [name for name in names if names.count(name) > 1])
        ]
        for name, limit in self.gates.items():
            fault = self._gate_fault(name, limit)
            if fault is not None:
                found.append(Conflict(("eval.gates",), *fault, item=name))
        return found

    def _gate_fault(self, name: str, limit: str) -> tuple[str, str] | None:
        """Return (found, fix) of a gate that cannot be read, or that nothing is measured for."""
        try:
            gate = parse_gate(name, limit)
        except GateRefused as refusal:
            return refusal.found, refusal.fix
        if gate.column is not None and gate.column not in self.columns:
            return f"{gate.column} is not measured", f"add {gate.column} to eval.columns"
        if gate.is_against_base and "base" not in self.columns:
            return "the base is not measured", "add base to eval.columns"
        if gate.is_against_base and gate.column is None and set(self.columns) == {"base"}:
            return "only the base is measured", "add the model that is made to eval.columns"
        return None
