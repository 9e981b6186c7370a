"""CPU, Metal or CUDA: where MLX computes here, and the settings that it needs.

Does not: hold models or arrays.
"""

from __future__ import annotations

import os

import mlx.core as mx

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


def bound_memory() -> None:
    """Set MLX's limits from the working set that the device recommends, where it recommends one.

    Wired: all of it, as mlx-lm does, so that weights are not paged out. Freed arrays that MLX
    keeps: an eighth, because batches of ever new lengths leave arrays that fit no later one.
    """
    working_set = int(mx.device_info().get("max_recommended_working_set_size", 0))
    if working_set:
        mx.set_wired_limit(working_set)
        mx.set_memory_limit(working_set)
        mx.set_cache_limit(working_set // CACHE_SHARE)
