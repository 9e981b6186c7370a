"""The tests, a package: `tests.tiny` makes tiny real models for all of them."""

import mlx_ft  # noqa: F401  (loads OpenBLAS before any test imports MLX)
