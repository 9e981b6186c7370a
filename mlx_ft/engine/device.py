"""CPU, Metal or CUDA: where MLX computes here, and the settings that it needs.

Does not: hold models or arrays.
"""

from __future__ import annotations

import mlx.core as mx


def on_cpu() -> bool:
    """Return whether MLX computes on the CPU here (Metal and CUDA do not)."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def configure_backend() -> None:
    """Prepare MLX for this machine: on a CPU, no run-time compiling of kernels.

    MLX on Linux compiles fused CPU kernels with g++ when it meets them. That needs a compiler and
    half a second a kernel, and saves about 8 % of a training step.
    """
    if on_cpu():
        mx.disable_compile()
