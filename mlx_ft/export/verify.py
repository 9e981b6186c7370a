"""Compare each step of the export with the one before, on fixed prompts and tensor by tensor.

Does: measure logits of adapter, fused and quantized model at every position of fixed prompts; read
the bits of every layer from the files. Does not: score tasks (the evaluation does).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_ft.errors import Fault, GateFailed

Logits = npt.NDArray[np.float32]
# Rounding weights to float16 (relative 2**-11) moves logits by a few thousandths of the largest.
FUSED_TOLERANCE = 0.02
# Mean divergence beyond which a quantized model is another model. 4-bit weights of small models
# are measured at 0.1 to 0.2 nats against 16-bit ones; 5-bit ones lie well below.
QUANTIZED_KL_LIMIT = 0.3


@dataclass(frozen=True)
class Check:
    """One verified claim: what was `measured` against which `limit`, in words, and whether it is
    `ok`.
    """

    check: str
    measured: str
    limit: str
    ok: bool


def prompt_logits(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[Logits]:
    """Return logits (T, vocabulary) of each prompt, in float32, computed one by one."""
    results = []
    for prompt in prompts:
        logits = model(mx.array([list(prompt)]))[0].astype(mx.float32)
        mx.eval(logits)
        results.append(np.array(logits, copy=True))
        mx.clear_cache()
    return results


def _log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    normalised: Logits = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def mean_divergence(reference: Sequence[Logits], other: Sequence[Logits]) -> float:
    """Return the mean KL divergence from reference to other over all positions, in nats."""
    values = []
    for ours, theirs in zip(reference, other, strict=True):
        p, q = _log_softmax(ours), _log_softmax(theirs)
        values.append((np.exp(p) * (p - q)).sum(axis=-1))
    return float(np.concatenate(values).mean())


def top_token_flips(reference: Sequence[Logits], other: Sequence[Logits]) -> float:
    """Return the share of positions where the most probable next token differs."""
    flips = [
        ours.argmax(axis=-1) != theirs.argmax(axis=-1)
        for ours, theirs in zip(reference, other, strict=True)
    ]
    return float(np.concatenate(flips).mean())


def check_fused(adapter: Sequence[Logits], fused: Sequence[Logits]) -> Check:
    """Fused 16-bit model against base + adapter: the largest logit difference, relative."""
    worst = max(
        float(np.abs(a - f).max() / np.abs(a).max()) for a, f in zip(adapter, fused, strict=True)
    )
    flips = top_token_flips(adapter, fused)
    return Check(
        "fused model equals base with adapter",
        f"largest logit difference {worst:.2e} of the largest logit, top token differs at "
        f"{flips:.2%} of positions",
        f"{FUSED_TOLERANCE:.0e}",
        bool(worst <= FUSED_TOLERANCE),
    )


def check_quantized(fused: Sequence[Logits], quantized: Sequence[Logits], bits: int) -> Check:
    """Quantized model against the fused one: divergence of next-token distributions."""
    divergence = mean_divergence(fused, quantized)
    flips = top_token_flips(fused, quantized)
    return Check(
        f"{bits}-bit model close to the fused one",
        f"mean divergence {divergence:.4f} nats, top token differs at {flips:.2%} of positions",
        f"{QUANTIZED_KL_LIMIT} nats",
        bool(divergence <= QUANTIZED_KL_LIMIT),
    )


def check_fused_layers(fused: Sequence[str], adapted: Sequence[str]) -> Check:
    """Every layer of the adapter, and no other, was fused."""
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


def check_bits(folder: Path, expected_modules: Sequence[str], bits: int) -> Check:
    """Every layer that was to be quantized has the recipe's bits, read back from the files."""
    found = layer_bits(folder)
    wrong = {m: b for m, b in found.items() if b != bits}
    complete = set(found) == set(expected_modules)
    sample = f", for example {next(iter(wrong.items()))}" if wrong else ""
    return Check(
        f"bits of every layer are {bits}",
        f"{len(found) - len(wrong)} of {len(expected_modules)} layers{sample}",
        "all of them",
        bool(found) and complete and not wrong,
    )


def check_copied(base: Path, folder: Path, names: Sequence[str]) -> Check:
    """Tokenizer and template files are the base's, byte for byte."""
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
    """Raise GateFailed with every check that did not hold."""
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
