"""Check `export.base`: is the 16-bit original the model that was trained?

Does: compare config, tensors and chat format as far as files tell, before anything is trained.
Does not: compare numbers, or know how mlx-lm renames tensors. Names that only one side has are left
to the export, which sees both models as mlx-lm loads them.
"""

from __future__ import annotations

from mlx_ft.preflight.findings import Finding, OriginalFacts, PreflightInput

CHECK = "export_base"
LIMIT = "the model that the trained one was quantized from"
FIX = "name that model in export.base, or leave it out"
# What decides which function a model's weights stand for. Keys as in the configs of mlx-lm.
CONFIG_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)
SHOWN_DIFFERENCES = 5


def export_base(facts: PreflightInput) -> Finding:
    """A model that is to get the adapter in place of the one that it was trained on."""
    original = facts.original
    if original is None:
        measured = "the adapter is fused into the model it is trained on"
        return Finding(CHECK, "ok", measured, "none named", "")
    differences = _differences(facts, original)
    if differences:
        more = len(differences) - SHOWN_DIFFERENCES
        shown = "; ".join(differences[:SHOWN_DIFFERENCES])
        measured = f"{shown}; and {more} more" if more > 0 else shown
        return Finding(CHECK, "fail", measured, LIMIT, FIX)
    if original.config.get("quantization") or original.config.get("quantization_config"):
        measured = "export.base is quantized itself"
        return Finding(CHECK, "warn", measured, "16-bit weights", "name the 16-bit original")
    same = len(original.trained_shapes.keys() & original.shapes.keys())
    measured = f"{same:,} tensors of the same names and shapes, the same chat format"
    return Finding(CHECK, "ok", measured, LIMIT, "")


def _differences(facts: PreflightInput, original: OriginalFacts) -> list[str]:
    ours, theirs = facts.model_config, original.config
    found = [
        f"{key} is {theirs.get(key)}, trained with {ours.get(key)}"
        for key in CONFIG_KEYS
        if ours.get(key) != theirs.get(key) and key in ours and key in theirs
    ]
    found += [
        f"{name} is {original.shapes[name]}, trained with {shape}"
        for name, shape in original.trained_shapes.items()
        if name in original.shapes and original.shapes[name] != shape
    ]
    return [*found, *original.chat_differences]
