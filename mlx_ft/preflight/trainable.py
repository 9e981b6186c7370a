"""Check that this base can be trained this way: full fine-tuning and DoRA.

mlx-lm has no layer for some bit widths, which would end hours of training in nothing.
Does not: look at weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_ft.model.shapes import EMBEDDING, model_shape
from mlx_ft.preflight.findings import Finding, Level, PreflightInput
from mlx_ft.preflight.forecast import adapted_modules

# mlx-lm's DoRALinear takes a packed row to hold 32 // bits numbers in each of its 32-bit words.
WORD_BITS = 32


def quantized_base(facts: PreflightInput) -> Finding:
    """Quantized weights, of which full fine-tuning could train none."""
    check, kind = "quantized_base", facts.recipe.train.fine_tune_type
    quantized = facts.model_config.get("quantization") is not None
    measured = f"fine_tune_type is {kind}, the model is {'' if quantized else 'not '}quantized"
    limit = "full needs weights that are not quantized"
    if kind != "full" or not quantized:
        return Finding(check, "ok", measured, limit, "")
    fix = "use the model's 16-bit version, or fine_tune_type: lora"
    return Finding(check, "fail", measured, limit, fix)


def dora(facts: PreflightInput) -> Finding:
    """Layers that mlx-lm's DoRA cannot be put on.

    Where weights are expanded before they are trained, as on a CPU, 5 bits would be found out by
    the export alone.
    """
    check, train = "dora", facts.recipe.train
    limit = "DoRA needs 2, 4, 8 or 16 bits, and no experts"
    if train.fine_tune_type != "dora":
        return Finding(check, "ok", f"fine_tune_type is {train.fine_tune_type}", limit, "")
    shape = model_shape(facts.model_config)
    if shape is None:
        return _of_unknown_layers(check, facts, limit)
    modules = adapted_modules(shape, train)
    experts = [name for name, module in modules.items() if module.experts > 1]
    if experts:
        measured = f"{len(experts)} adapted modules are experts, such as {experts[0]}"
        fix = "use fine_tune_type: lora, or train.lora_parameters.keys without them"
        return Finding(check, "fail", measured, limit, fix)
    if EMBEDDING in modules and facts.model_config.get("quantization") is not None:
        measured = f"{EMBEDDING} is adapted, and quantized, which mlx-lm's DoRA has no code for"
        fix = "use a 16-bit model, fine_tune_type: lora, or train.lora_parameters.keys without it"
        return Finding(check, "fail", measured, limit, fix)
    odd = {
        name: bits
        for name, module in modules.items()
        if (bits := _bits(facts.model_config, name, module.inputs)) and WORD_BITS % bits
    }
    if odd:
        name = next(iter(odd))
        measured = f"{len(odd)} of {len(modules)} adapted modules have such bits as {odd[name]}"
        return Finding(check, "fail", f"{measured} ({name})", limit, _fix())
    return Finding(check, "ok", f"{len(modules)} adapted modules can carry DoRA", limit, "")


def _fix() -> str:
    return "use the model in 4, 8 or 16 bits, or fine_tune_type: lora"


def _bits(config: Mapping[str, Any], name: str, inputs: int) -> int | None:
    """Return the bits of a module as the config has them; None where it is not quantized."""
    settings = config.get("quantization")
    if not isinstance(settings, Mapping):
        return None
    own = settings.get(name, settings)
    if not isinstance(own, Mapping) or inputs % int(own.get("group_size", 1)):
        return None
    bits = own.get("bits")
    return bits if isinstance(bits, int) else None


def _of_unknown_layers(check: str, facts: PreflightInput, limit: str) -> Finding:
    """Judge by all bits that the config names: which of them are adapted is not known."""
    settings = facts.model_config.get("quantization")
    named = [settings, *settings.values()] if isinstance(settings, Mapping) else []
    bits = {each.get("bits") for each in named if isinstance(each, Mapping)}
    odd = [each for each in bits if isinstance(each, int) and WORD_BITS % each]
    measured = f"weights of {', '.join(map(str, sorted(filter(None, bits)))) or 16} bits"
    if not odd:
        return Finding(check, "ok", measured, limit, "")
    level: Level = "fail" if len(odd) == len(bits) else "warn"
    return Finding(check, level, measured, limit, _fix())
