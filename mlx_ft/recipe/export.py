"""The `export` section of a recipe. Does not export."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from mlx_ft.recipe.evaluation import EvalRecipe
from mlx_ft.recipe.fields import Conflict, Real, Section, Text, whole_from_text

GgufKind = Literal["f16", "q8_0", "q4_0"]
FOR_GGUF = "export.gguf"
# Bits that a weight may have in the end, and that are compared in every export.
Q_BITS: tuple[Literal[4, 5, 6, 8], ...] = (4, 5, 6, 8)


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


def fused_copy_needed_by(export: ExportRecipe, evaluation: EvalRecipe) -> tuple[str, ...]:
    """Return the uses of the 16-bit model as files. Without any, it is never written."""
    needs = {
        "export.keep_fused": export.keep_fused,
        FOR_GGUF: export.gguf is not None,
        "the fused column": bool(evaluation.suites) and "fused" in evaluation.columns,
    }
    return tuple(name for name, needed in needs.items() if needed)
