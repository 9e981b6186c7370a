"""mlx-ft: one YAML recipe in, one trustworthy fine-tuned MLX model out.

Importing the package loads OpenBLAS on Linux (see `system/blas.py`), because that has to happen
before the first import of MLX. It turns TF32 off (see `system/precision.py`), because that has to
happen before MLX computes. It imports nothing heavy.
"""

from mlx_ft.system.blas import preload_openblas
from mlx_ft.system.precision import keep_float32

__all__ = ["BLAS", "__version__"]

__version__ = "0.1.0"
BLAS = preload_openblas()
keep_float32()
