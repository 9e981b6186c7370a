"""Limits of the export: the fused model equals the adapter, the quantized one is close to it.

Does: judge measured differences; read the bits of every layer back from the files.
Does not: run models (`verify_logits.py`), or score tasks (`evaluate/` does).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ft.errors import Fault, GateFailed
from mlx_ft.export.bit_widths import Bits
from mlx_ft.export.verify_logits import Difference

# Both models compute in float32 with the weights that they store, on every device. What is left of
# a right fusion is the rounding of its weights. To float16 (2**-11 of a number) it moves logits by
# at most 0.011 of the largest in random models (0.0007 in SmolLM2-135M), and by 2e-6 nats. To
# bfloat16 (2**-8) it is 8 times that, and 64 times the nats, which grow with the square.
FUSED_TOLERANCE = 0.02
ROUNDING_NATS = 1e-5
# The fused model may be this share of the adapter's own effect away (nats). A scale that is off by
# a tenth is 0.0015 to 0.017 of it away.
FUSED_SHARE = 5e-4
# Mean divergence (nats) beyond which a quantized model is another model. 4-bit weights of small
# models are measured at 0.1 to 0.2 nats against 16-bit ones; 5-bit ones lie well below.
QUANTIZED_KL_LIMIT = 0.3


@dataclass(frozen=True)
class Check:
    """One verified claim.

    check: the claim. measured: the measurement, as text. limit: its limit, as text. ok: it holds.
    """

    check: str
    measured: str
    limit: str
    ok: bool


def check_fused(difference: Difference, learned: Difference, dtype: mx.Dtype) -> Check:
    """Check the fused model against base + adapter: by the largest logit difference and in nats.

    learned: what the adapter changes of its base. dtype: the type that fused weights are rounded
    to.
    """
    coarser = float(mx.finfo(dtype).eps / mx.finfo(mx.float16).eps)
    largest = FUSED_TOLERANCE * coarser
    nats = max(ROUNDING_NATS * coarser**2, FUSED_SHARE * learned.divergence)
    return Check(
        "fused model equals base with adapter",
        f"largest logit difference {difference.largest:.2e} of the largest logit, mean divergence "
        f"{difference.divergence:.1e} nats ({learned.divergence:.1e} between base and adapter), "
        f"top token differs at {difference.flips:.2%} of positions",
        f"{largest:.2g} of the largest logit, {nats:.1e} nats",
        bool(difference.largest <= largest and difference.divergence <= nats),
    )


def check_quantized(difference: Difference, bits: Bits) -> Check:
    """Check the quantized model against the fused one: divergence of next-token distributions."""
    return Check(
        f"{bits}-bit model close to the fused one",
        f"mean divergence {difference.divergence:.4f} nats, top token differs at "
        f"{difference.flips:.2%} of positions",
        f"{QUANTIZED_KL_LIMIT} nats",
        bool(difference.divergence <= QUANTIZED_KL_LIMIT),
    )


def check_fused_layers(fused: Sequence[str], adapted: Sequence[str]) -> Check:
    """Check that every layer of the adapter was fused, and no other."""
    return Check(
        "fused layers are the adapter's layers",
        f"{len(fused)} fused, {len(adapted)} adapted",
        "the same names",
        bool(fused) and sorted(fused) == sorted(adapted),
    )


def layer_bits(folder: Path) -> dict[str, int]:
    """Return module -> bits of every quantized layer, computed from tensor shapes in the files."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings: dict[str, Any] = config.get("quantization", {})
    tensors: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(file))  # lazy: only headers are read
        assert isinstance(loaded, dict)
        tensors.update(loaded)
    bits = {}
    for name, scales in tensors.items():
        if name.endswith(".scales"):
            module = name.removesuffix(".scales")
            own = settings.get(module, settings)
            inputs = scales.shape[-1] * own["group_size"]
            bits[module] = tensors[f"{module}.weight"].shape[-1] * 32 // inputs
    return bits


def check_bits(
    folder: Path, expected_modules: Sequence[str], bits: Bits, half_modules: int = 0
) -> Check:
    """Check that every expected layer has its bits, read back from the files.

    half_modules: number of layers that stay 16-bit.
    """
    found = layer_bits(folder)
    wrong = {m: b for m, b in found.items() if b != bits.of(m)}
    complete = set(found) == set(expected_modules)
    sample = f", for example {next(iter(wrong.items()))}" if wrong else ""
    which = "quantized layer" if half_modules else "layer"
    others = f"; {half_modules} others stay 16-bit" if half_modules else ""
    return Check(
        f"bits of every {which} are {bits}",
        f"{len(found) - len(wrong)} of {len(expected_modules)} layers{others}{sample}",
        "all of them",
        bool(found) and complete and not wrong,
    )


def check_copied(base: Path, folder: Path, names: Sequence[str]) -> Check:
    """Check that tokenizer and template files are the base's, byte for byte."""
    different = [
        name
        for name in names
        if (base / name).exists() and (base / name).read_bytes() != (folder / name).read_bytes()
    ]
    return Check(
        f"tokenizer and template of {folder.name} are the base's",
        f"{len(different)} files differ" if different else "byte for byte",
        "no difference",
        not different,
    )


def require_all(checks: Sequence[Check]) -> None:
    """Raise GateFailed with every check that failed."""
    faults = [
        Fault(f"export: {c.check}", f"{c.measured} (limit: {c.limit})", "see the run's report")
        for c in checks
        if not c.ok
    ]
    if faults:
        raise GateFailed(faults)


def checks_info(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """Return the checks as plain JSON."""
    return [asdict(check) for check in checks]
