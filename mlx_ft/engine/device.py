"""CPU, Metal or CUDA: where MLX computes here, and the settings that it needs.

Does not: hold models or arrays.
"""

from __future__ import annotations

import os

import mlx.core as mx

# For tests: set to 1, every answer is that of a machine with a GPU, whatever computes.
AS_GPU = "MLX_FT_AS_GPU"


def on_cpu() -> bool:
    """Return whether MLX computes on the CPU here (Metal and CUDA do not).

    The environment variable MLX_FT_AS_GPU=1 makes the answer no, so that a machine without a GPU
    takes a GPU's way: weights and activations as stored, compiled kernels, GPU budgets.
    """
    if os.environ.get(AS_GPU) == "1":
        return False
    return bool(mx.default_device() == mx.Device(mx.cpu))


def configure_backend() -> None:
    """Prepare MLX for this machine: on a CPU, no run-time compiling of kernels.

    MLX on Linux compiles fused CPU kernels with g++ when it meets them. That needs a compiler and
    half a second a kernel, and saves about 8 % of a training step.
    """
    if on_cpu():
        mx.disable_compile()
