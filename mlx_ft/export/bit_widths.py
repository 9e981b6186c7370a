"""Bits per layer of a quantized model, and how its config states them.

Does not: choose the bits (`export/survival/verdict.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Bits:
    """Bits of the weights. usual: of all modules but the raised. raised: module -> more bits."""

    usual: int
    raised: Mapping[str, int] = field(default_factory=dict)

    def of(self, module: str) -> int:
        return self.raised.get(module, self.usual)

    @property
    def folder(self) -> str:
        """Name of the model's folder, such as q5, or q4-mixed."""
        return f"q{self.usual}-mixed" if self.raised else f"q{self.usual}"

    def __str__(self) -> str:
        if not self.raised:
            return str(self.usual)
        most = max(self.raised.values())
        return f"{self.usual} to {most} ({len(self.raised)} layers with more than {self.usual})"


def described_quantization(
    config: Mapping[str, Any], bits: Bits, group_size: int
) -> dict[str, Any]:
    """Return a config with the quantization of its model, in the keys that mlx-lm reads."""
    settings: dict[str, Any] = {"group_size": group_size, "bits": bits.usual, "mode": "affine"}
    for module, own in sorted(bits.raised.items()):
        settings[module] = {"group_size": group_size, "bits": own, "mode": "affine"}
    described = copy.deepcopy(dict(config))
    # mlx-lm reads the first key, the Hugging Face Hub the second.
    described.update(quantization=settings, quantization_config=copy.deepcopy(settings))
    return described
