"""Find layers that cannot be quantized, because their rows are not whole groups.

Does: suggest the group size that takes them.
Does not: quantize.
"""

from __future__ import annotations

from mlx_ft.model.shapes import ModelShape, Module, model_shape
from mlx_ft.preflight.findings import Finding, PreflightInput, some_of

CHECK = "q_group_size"
GROUP_SIZES = (128, 64, 32)  # those that MLX has


def q_group_size(facts: PreflightInput) -> Finding:
    """Layers that would stay 16-bit in the model that is called quantized."""
    size = facts.recipe.export.q_group_size
    limit = f"rows of whole groups of {size}"
    shape = model_shape(facts.model_config)
    if shape is None:
        name = facts.model_config.get("model_type", "unknown")
        measured = f"not computed: the layers of {name} models are not known here"
        return Finding(CHECK, "warn", measured, limit, "see what the export says")
    modules, left = shape.modules, half_modules(shape, size)
    if not left:
        return Finding(CHECK, "ok", f"all {len(modules)} layers can be quantized", limit, "")
    fits = [each for each in GROUP_SIZES if not half_modules(shape, each)]
    fix = f"set export.q_group_size: {fits[0]}" if fits else "set export.q_group_size: 32"
    names = list(dict.fromkeys(module.name for module in left))
    widths = sorted({module.row_width for module in left})
    kinds = f"{some_of(names)} with rows of {some_of(widths)}"
    if len(left) == len(modules):
        return Finding(CHECK, "fail", f"no layer can be quantized ({kinds})", limit, fix)
    share = sum(m.parameters for m in left) / shape.parameters
    measured = f"{len(left)} of {len(modules)} layers stay 16-bit, {share:.0%} of the weights"
    return Finding(CHECK, "warn", f"{measured} ({kinds})", limit, fix)


def half_modules(shape: ModelShape, group_size: int) -> tuple[Module, ...]:
    """Return the modules whose rows are not whole groups, once for each layer."""
    return tuple(module for module in shape.modules if module.row_width % group_size)


def half_parameters(shape: ModelShape, group_size: int) -> int:
    """Return the parameters that stay 16-bit."""
    return sum(module.parameters for module in half_modules(shape, group_size))
