"""mlx-ft: one YAML recipe in, one trustworthy fine-tuned MLX model out.

Importing the package loads OpenBLAS on Linux (see `system/blas.py`), because that has to happen
before the first import of MLX; it imports nothing heavy.
"""

from mlx_ft.system.blas import preload_openblas

__all__ = ["BLAS", "__version__"]

__version__ = "0.1.0"
BLAS = preload_openblas()
