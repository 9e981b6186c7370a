"""Keep float32 products in float32 on GPUs that would compute them in TF32.

Does not: import MLX, or change products of 16 bits.
"""

from __future__ import annotations

import os

# Read by MLX once in a process, at its first product; it is on where it is not set. On an Apple M5
# (and in CUDA) a float32 product then has 10 bits of fraction, as few as float16. The proofs at
# start-up and the checks of an export are about errors smaller than that.
TF32 = "MLX_ENABLE_TF32"


def keep_float32() -> None:
    """Turn TF32 off in this process and those it starts, unless the user has set it.

    It has to happen before MLX computes.
    """
    os.environ.setdefault(TF32, "0")
