"""An adapter file that a training starts from: its hash and tensor shapes.

Does not: import MLX, compare it with a recipe (`preflight/adapter_start.py`), or load weights.
"""

from __future__ import annotations

from pathlib import Path

from mlx_ft.errors import Fault, ModelError
from mlx_ft.model.safetensors_headers import tensor_shapes
from mlx_ft.system.files import file_sha256

KEY = "train.resume_adapter_file"


def start_sha256(file: str | None) -> str | None:
    """Return a hash of the weights to start from, None when none are named; see `start_shapes`."""
    if file is None:
        return None
    start_shapes(file)
    return file_sha256(Path(file))


def start_shapes(file: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a file of adapter weights; ModelError when it is none."""
    path = Path(file)
    if path.is_dir():
        fix = "name the file in it, such as adapters.safetensors"
        raise ModelError(Fault(f"{KEY}: {file}", "is a folder", fix))
    try:
        return tensor_shapes(path)
    except FileNotFoundError as error:
        raise ModelError(Fault(f"{KEY}: {file}", "not found", "check the path")) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        fix = "name a safetensors file of adapter weights"
        raise ModelError(Fault(f"{KEY}: {file}", f"not readable ({reason})", fix)) from error
