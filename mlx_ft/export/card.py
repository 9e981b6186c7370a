"""Export section of a model README, shared by the model folders and the published card.

Does: write the export's measurements and warnings, and how to call the chat template, as Markdown.
Does not: measure, judge, or print local paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_ft.export.survival.words import bits_name, form_name, forms_of, kept_text, nats
from mlx_ft.model.thinking_mode import FILE, KEY
from mlx_ft.recipe.schema import ExportRecipe
from mlx_ft.text import quantities as q
from mlx_ft.text.markdown import cell, public_path, table_lines

# The default limit, below which a warning is given even if the recipe sets no limit.
LEAST_SURVIVAL = ExportRecipe().min_survival or 0.0


def thinking_lines(enable_thinking: bool) -> Iterator[str]:
    """Yield how to call the chat template, and how to tell mlx-lm."""
    arguments = f'{{"enable_thinking": {str(enable_thinking).lower()}}}'
    yield (
        "It was trained and measured through its chat template only, with "
        f"`enable_thinking={enable_thinking}`. `{FILE}` says so too (`{KEY}`), which mlx-lm does "
        f"not read: give `mlx_lm.generate` `--chat-template-config '{arguments}'` and "
        f"`mlx_lm.server` `--chat-template-args '{arguments}'`, if the template has such a mode."
    )


def export_section(
    export: Mapping[str, Any], survival: Mapping[str, Any] | None, column: str
) -> Iterator[str]:
    """Yield the section on the effects of fusing and quantizing.

    export: the info of the stage's manifest. survival: its survival.json (None: there is none).
    column: the model that the README belongs to.
    """
    quantized, fused = export["quantized"], export["fused"]
    yield "## What fusing and quantizing changed"
    yield ""
    method = cell(quantized.get("method", "method not recorded"))
    size = "not kept" if fused is None else q.format_bytes(fused["bytes"])
    yield (
        f"{bits_name(quantized)}, in groups of {quantized['group_size']} ({method}), "
        f"{q.format_bytes(quantized['bytes'])}; fused in 16 bits, {size}."
    )
    yield ""
    if survival is not None and forms_of(survival):
        yield from _survival(survival, column)
    rows = [[check["check"], check["measured"], check["limit"]] for check in export["checks"]]
    yield from table_lines(["verified", "measured", "limit"], rows)
    warnings = list(export_warnings(export, survival))
    yield ""
    yield "Warnings:" if warnings else "Warnings: none."
    if warnings:
        yield ""
    yield from (f"- {cell(warning)}" for warning in warnings)


def _survival(survival: Mapping[str, Any], column: str) -> Iterator[str]:
    learned = nats((survival.get("model") or {}).get("learned_nats"))
    yield (
        f"Training moved the model by {learned} on held-out rows (KL divergence, next tokens, base "
        "to adapter). Survival is the share of it that is left: 1 - KL(adapter, stored) / "
        "KL(adapter, base)."
    )
    yield ""
    head = ["stored as", "survival", "KL from the adapter, held-out rows", "KL, prompts"]
    rows = []
    for name, form in forms_of(survival).items():
        shown = form_name(name, survival) + (" (this model)" if name == column else "")
        kept = kept_text(form.get("survival"))
        rows.append([shown, kept, nats(form.get("nats")), nats(form.get("prompt_nats"))])
    yield from table_lines(head, rows)
    yield ""


def export_warnings(export: Mapping[str, Any], survival: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield warnings for users of the model, on points that its checks let pass."""
    if export.get("dtype_reason"):
        yield str(export["dtype_reason"])
    yield from _survival_warnings(survival)
    quantized = export["quantized"]
    if half := quantized.get("half_layers"):
        size = quantized["group_size"]
        yield f"{half} layers stay 16-bit: their rows are not whole groups of {size} numbers."
    if quantized.get("method") == "gptq" and not quantized.get("gptq_layers", 1):
        yield "No calibration row went through any layer: every weight was rounded by itself."
    if export.get("original"):
        yield from _original_warnings(export["original"])


def _survival_warnings(survival: Mapping[str, Any] | None) -> Iterator[str]:
    if survival is None:
        yield "What is left of the training was not measured."
        return
    kept, bits = survival.get("survival"), bits_name(survival)
    if not q.is_number(kept):
        yield "Training changed nothing on held-out rows that could be measured."
    elif kept < LEAST_SURVIVAL:
        left = kept_text(kept) if kept >= 0 else "nothing (noise is larger)"
        yield f"The {bits} model keeps {left} of what training changed."
    if survival.get("min_survival") is None:
        yield "The recipe set no limit on what must survive (export.min_survival: null)."


def _original_warnings(original: Mapping[str, Any]) -> Iterator[str]:
    found = (original.get("from_trained") or {}).get("into the original") or {}
    half, small = (
        nats((found.get(model) or {}).get("divergence")) for model in ("fused", "quantized")
    )
    yield (
        "The adapter was trained on a quantized model and fused into its original "
        f"({public_path(str(original.get('path')))}): {half} from what was trained, {small} once "
        "quantized."
    )
