"""CPU, Metal or CUDA: where MLX computes here, and the settings that it needs.

Does not: hold models or arrays.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import mlx.core as mx

from mlx_ft.text.quantities import format_bytes

# For tests: set to 1, every answer is that of a machine with a GPU, whatever computes.
AS_GPU = "MLX_FT_AS_GPU"
CACHE_SHARE = 8


def on_cpu() -> bool:
    """Return whether MLX computes on the CPU here (Metal and CUDA do not).

    The environment variable MLX_FT_AS_GPU=1 makes the answer no, so that a machine without a GPU
    takes a GPU's way: weights and activations as stored, compiled kernels, GPU budgets.
    """
    if os.environ.get(AS_GPU) == "1":
        return False
    return bool(mx.default_device() == mx.Device(mx.cpu))


def configure_backend() -> None:
    """Prepare MLX for this machine: a GPU's memory is bounded, a CPU compiles no kernels.

    MLX on Linux compiles fused CPU kernels with g++ when it meets them. That needs a compiler and
    half a second a kernel, and saves about 8 % of a training step.
    """
    if on_cpu():
        mx.disable_compile()
    else:
        bound_memory()


@dataclass(frozen=True)
class MemoryLimits:
    """What MLX may hold of a GPU's memory (bytes), where the device recommends a working set.

    wired_bytes: held without being paged out, arrays and all: the whole working set, as mlx-lm.
    cache_bytes: freed arrays that are kept for later ones: an eighth, because batches of ever new
        lengths leave arrays that fit no later one.
    """

    wired_bytes: int
    cache_bytes: int

    @property
    def words(self) -> str:
        """Say the limits."""
        wired, cache = format_bytes(self.wired_bytes), format_bytes(self.cache_bytes)
        return f"MLX may hold {wired} of this GPU's memory, and keep {cache} of freed arrays"


def memory_limits() -> MemoryLimits | None:
    """Return the limits for this device; None on a CPU, and where nothing is recommended."""
    working_set = (
        0 if on_cpu() else int(mx.device_info().get("max_recommended_working_set_size", 0))
    )
    return MemoryLimits(working_set, working_set // CACHE_SHARE) if working_set else None


def bound_memory() -> None:
    """Set MLX's limits from the working set that the device recommends, where it recommends one."""
    limits = memory_limits()
    if limits is not None:
        mx.set_wired_limit(limits.wired_bytes)
        mx.set_memory_limit(limits.wired_bytes)
        mx.set_cache_limit(limits.cache_bytes)
