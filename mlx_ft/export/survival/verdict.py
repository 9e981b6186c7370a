"""Write survival.json, stop a model that lost too much of its training, choose bits.

Does not: measure (`audit.py`, `export/verify_models.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_ft.errors import Fault, GateFailed
from mlx_ft.export.bit_widths import Bits
from mlx_ft.export.survival.audit import rounded_name
from mlx_ft.export.survival.measures import Change, Divergence, Kept, LayerAudit, model_survival
from mlx_ft.recipe.names import FUSED, QUANTIZED
from mlx_ft.recipe.schema import Q_BITS, ExportRecipe

SURVIVAL_FILE = "survival.json"
SCHEMA = 1
FORMS = (FUSED, QUANTIZED, *(rounded_name(bits) for bits in Q_BITS))
WORST_LAYERS = 3


@dataclass(frozen=True)
class Survival:
    """Result of an audit.

    bits: bits of the quantized model. learned: divergence of the base from the adapter on held-out
    rows (None: none measured). held_out, prompts: stored form -> its divergence from the adapter.
    layers: audits of the adapted layers. positions: passages -> number of positions compared.
    seconds: time that the audit took.
    """

    bits: Bits
    learned: Divergence | None
    held_out: Mapping[str, Divergence]
    prompts: Mapping[str, Divergence]
    layers: Sequence[LayerAudit]
    positions: Mapping[str, int]
    seconds: float

    def of(self, form: str) -> float | None:
        """Return the survival of the model in a stored form; None when nothing was learned."""
        if self.learned is None or form not in self.held_out:
            return None
        return model_survival(self.learned, self.held_out[form])


def survival_json(found: Survival, recipe: ExportRecipe, dtype: str) -> dict[str, Any]:
    """Return the content of survival.json; its keys are documented in `runs/document.py`."""
    return {
        "schema": SCHEMA,
        "bits": found.bits.usual,
        "raised": dict(found.bits.raised),
        "group_size": recipe.q_group_size,
        "method": recipe.q_method,
        "dtype": dtype,
        "min_survival": recipe.min_survival,
        "survival": found.of(QUANTIZED),
        "positions": dict(found.positions),
        "model": {
            "learned_nats": None if found.learned is None else found.learned.nats,
            "ways": {form: _form_json(found, form) for form in FORMS},
        },
        "layers": [_layer_json(layer, found.bits) for layer in found.layers],
        "seconds": found.seconds,
    }


def _form_json(found: Survival, form: str) -> dict[str, Any]:
    held_out, prompts = found.held_out.get(form), found.prompts.get(form)
    return {
        "survival": found.of(form),
        "nats": None if held_out is None else held_out.nats,
        "flips": None if held_out is None else held_out.flips,
        "prompt_nats": None if prompts is None else prompts.nats,
        "prompt_flips": None if prompts is None else prompts.flips,
    }


def _layer_json(layer: LayerAudit, bits: Bits) -> dict[str, Any]:
    return {
        "name": layer.name,
        "bits": bits.of(layer.name),
        "delta_over_weight": layer.delta_over_weight,
        "kept": {form: _kept_json(kept) for form, kept in layer.kept.items()},
    }


def _kept_json(kept: Kept) -> dict[str, Any]:
    outputs = kept.outputs or Change()
    return {
        "gain": kept.weights.gain,
        "noise": kept.weights.noise,
        "output_gain": outputs.gain,
        "output_noise": outputs.noise,
        "survival": kept.survival,
    }


def summary_lines(found: Survival) -> list[str]:
    """Return the audit as a few lines for the terminal."""
    if found.learned is None or found.of(QUANTIZED) is None:
        return ["survival: training changed nothing on held-out rows that could be measured"]
    rounding = ", ".join(f"{bits} bits {_share(found.of(rounded_name(bits)))}" for bits in Q_BITS)
    return [
        f"survival: {_share(found.of(QUANTIZED))} of what training changed "
        f"({found.learned.nats:.3g} nats) is in the {found.bits}-bit model, "
        f"{_share(found.of(FUSED))} in the 16-bit one",
        f"  rounded, for comparison: {rounding}",
    ]


def _share(survival: float | None) -> str:
    if survival is None:
        return "unknown"
    return f"{survival:.1%}" if survival >= 0 else "nothing (noise is larger)"


def survives(found: Survival, limit: float) -> bool:
    """Return whether the final model keeps enough; a model that learned nothing does not."""
    kept = found.of(QUANTIZED)
    return kept is not None and kept >= limit


def require_survival(found: Survival, recipe: ExportRecipe) -> None:
    """Raise GateFailed when too little survived, with the worst layers and what to do."""
    limit = recipe.min_survival
    if limit is None or survives(found, limit):
        return
    where = f"export.min_survival {limit:g}"
    if found.learned is None or found.of(QUANTIZED) is None:
        nothing = "training changed nothing on held-out rows that could be measured"
        fix = "train longer or with a higher train.learning_rate, or set export.min_survival: null"
        raise GateFailed(Fault(where, nothing, fix))
    lost = (
        f"the {found.bits}-bit model keeps {_share(found.of(QUANTIZED))} of what training changed "
        f"(KL {found.held_out[QUANTIZED].nats:.3g} nats from the adapter, which is "
        f"{found.learned.nats:.3g} nats from the base)"
    )
    raise GateFailed([Fault(where, lost, _advice(found, limit)), *_layer_faults(found, limit)])


def _advice(found: Survival, limit: float) -> str:
    enough = [b for b in Q_BITS if (found.of(rounded_name(b)) or 0.0) >= limit]
    enough = [bits for bits in enough if bits > found.bits.usual]
    half = found.of(FUSED)
    if enough:
        return f"set export.q_bits: {enough[0]} (rounded to that it keeps enough), or auto"
    if half is not None and half < limit:
        return "even the 16-bit model lost it: set export.dtype: float16, or train with more effect"
    return (
        "no number of bits keeps it: train with more effect (a higher learning rate or scale, more "
        "rows or epochs), or use the base with its adapter, or the 16-bit model"
    )


def _layer_faults(found: Survival, limit: float) -> Iterator[Fault]:
    """Yield a fault for each of the WORST_LAYERS that keep least, if they keep too little."""
    kept = [
        (survival, layer)
        for layer in found.layers
        if (survival := layer.kept[QUANTIZED].survival) is not None
    ]
    lost = sorted(
        ((survival, layer) for survival, layer in kept if survival < limit),
        key=lambda pair: (pair[0], pair[1].name),
    )
    if kept and not lost:
        least = min(survival for survival, _ in kept)
        elsewhere = f"every adapted layer keeps {least:.1%} or more: it is lost in layers that were"
        fix = "more bits for the whole model help"
        yield Fault("adapted layers", f"{elsewhere} not trained", fix)
    for survival, layer in lost[:WORST_LAYERS]:
        weights = layer.kept[QUANTIZED].weights
        measured = (
            f"{_share(survival)} of its change is left: delta {layer.delta_over_weight:.2%} of the "
            f"weights, gain {weights.gain:.2f}, rounding noise {weights.noise:.1f} deltas"
        )
        usual = found.bits.usual
        fix = f"{layer_bits_for(layer, usual, limit)} bits would keep more of it"
        yield Fault(
            f"{layer.name} ({found.bits.of(layer.name)} bits)",
            measured,
            fix if usual < max(Q_BITS) else "only 16 bits keep more of it",
        )


def layer_bits_for(layer: LayerAudit, usual: int, limit: float) -> int:
    """Return the fewest bits above `usual` with which a rounded layer keeps enough; else 8."""
    for bits in Q_BITS:
        kept = layer.kept[rounded_name(bits)].survival
        if bits > usual and (kept is None or kept >= limit):
            return bits
    return max(Q_BITS)


def raised_layers(found: Survival, limit: float) -> dict[str, int]:
    """Return layers that keep too little -> the bits with which they keep enough."""
    return {
        layer.name: layer_bits_for(layer, found.bits.usual, limit)
        for layer in found.layers
        if (kept := layer.kept[QUANTIZED].survival) is not None and kept < limit
    }


def next_bits(recipe: ExportRecipe, tried: Survival | None) -> Bits | None:
    """Return the bits to try next, or None when the bits that were tried are final.

    With q_bits auto the fewest bits come first, then the same with more bits for the layers that
    keep too little, then the next number of bits.
    """
    if recipe.q_bits != "auto":
        return Bits(recipe.q_bits) if tried is None else None
    limit = recipe.min_survival
    assert limit is not None, "the recipe refuses auto without a limit"
    if tried is None:
        return Bits(Q_BITS[0])
    if survives(tried, limit) or tried.bits.usual == max(Q_BITS):
        return None
    if not tried.bits.raised:
        raised = raised_layers(tried, limit)
        if raised:
            return Bits(tried.bits.usual, raised)
    return Bits(min(bits for bits in Q_BITS if bits > tried.bits.usual))
