"""What a user can ask of the export and of the measurement at the end.

Does: declare the recipe's `export` and `eval` keys and the checks between them. Does not: read
suites, export or evaluate.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from mlx_ft.gate_terms import Gate, GateRefused, parse_gate
from mlx_ft.gguf_support import GgufKind
from mlx_ft.recipe_values import Conflict, Real, Section, Text, Whole, whole_from_text

Column = Literal["base", "adapter", "fused", "quantized"]
FOR_GGUF = "export.gguf"
COLUMNS: tuple[Column, ...] = ("base", "adapter", "fused", "quantized")
# Bits that a weight may have in the end, and that are compared in every export.
Q_BITS: tuple[Literal[4, 5, 6, 8], ...] = (4, 5, 6, 8)


def _limit_text(value: object) -> object:
    """Return a bare number as text, so that it is refused as a limit, beside other limits."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


class ExportRecipe(Section):
    """What is made of the adapter."""

    dtype: Literal["float16", "bfloat16"] = Field(
        "float16", description="Type of the dequantized, fused model."
    )
    q_bits: Annotated[Literal[4, 5, 6, 8, "auto"], BeforeValidator(whole_from_text)] = Field(
        5,
        description="Bits of the final model. auto: the fewest that keep `min_survival`, with more "
        "in single layers if that is enough; it quantizes up to seven times.",
    )
    q_group_size: Annotated[Literal[32, 64, 128], BeforeValidator(whole_from_text)] = Field(
        64, description="Quantization group size."
    )
    q_method: Literal["gptq", "round"] = Field(
        "gptq",
        description="gptq: each rounding error is made up for by the weights after it, on "
        "training rows; round: each weight by itself, as mlx_lm.convert does.",
    )
    min_survival: Annotated[Real, Field(lt=1)] | None = Field(
        0.9,
        description="Share of what training changed that the final model must keep, else the run "
        "stops: 1 - KL(adapter, final) / KL(adapter, base) where held-out rows were trained. "
        "Null: measured, but nothing is stopped.",
    )
    keep_fused: bool = Field(
        True,
        description="Keep the 16-bit model after the run; it is the bulk of the disk. Otherwise it "
        "is only written where a later step needs it, and deleted after that.",
    )
    base: Text | None = Field(
        None,
        description="The 16-bit original of a quantized model: a Hub id or a local folder. The "
        "adapter is then fused into that. Null: into the model that was trained on.",
    )
    gguf: GgufKind | None = Field(
        None,
        description="Write the 16-bit model as a GGUF file of this type too, for llama.cpp and "
        "Ollama. Null: none.",
    )

    @property
    def most_bits(self) -> int:
        """The most bits that a weight of the final model can have."""
        return max(Q_BITS) if self.q_bits == "auto" else self.q_bits

    def conflicts(self) -> list[Conflict]:
        """Return a conflict for bits that are to be chosen by a limit that is not there."""
        if self.q_bits != "auto" or self.min_survival is not None:
            return []
        keys = ("export.q_bits", "export.min_survival")
        fix = "give a min_survival, or the bits"
        return [Conflict(keys, "q_bits is auto and min_survival null", fix)]


class EvalRecipe(Section):
    """The measurement at the end."""

    suites: list[Text] = Field(
        default_factory=list, description="Suite files, relative to the current folder."
    )
    columns: list[Column] = Field(
        default_factory=lambda: list(COLUMNS),
        min_length=1,
        description="Models to measure, side by side.",
    )
    limit: Whole | None = Field(
        None,
        ge=1,
        description="Prompts of each suite that are asked, from its beginning. Null: all of them.",
    )
    batch_size: Whole = Field(32, ge=1, description="Prompts generated at a time.")
    gates: dict[Text, Annotated[str, BeforeValidator(_limit_text)]] = Field(
        default_factory=dict,
        description="Limits that a measured number must keep, or the run ends with exit code 1: "
        '`{code_mode.quantized.mean: ">= 0.9", keep_talking.drop: "<= 0.05"}`. Without a column it '
        "is the last one that is measured; the metrics are in the table of gates below.",
    )

    def parsed_gates(self) -> list[Gate]:
        """Return the gates; those of a recipe that was loaded can all be read."""
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


def fused_copy_needed_by(export: ExportRecipe, evaluation: EvalRecipe) -> tuple[str, ...]:
    """Return what needs the 16-bit model as files; without anything it is never written."""
    needs = {
        "export.keep_fused": export.keep_fused,
        FOR_GGUF: export.gguf is not None,
        "the fused column": bool(evaluation.suites) and "fused" in evaluation.columns,
    }
    return tuple(name for name, needed in needs.items() if needed)
