"""The tests' own package; its import settles how BLAS computes, before anything imports MLX."""

import os
import sys

# Test processes run side by side, on tiny models: BLAS threads that wait for each other cost far
# more than they bring. Set before OpenBLAS is loaded, and inherited by every subprocess. Benchmarks
# have what a user has.
if "pytest" in sys.modules:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx_ft

__all__ = ["mlx_ft"]
