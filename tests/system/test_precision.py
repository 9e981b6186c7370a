"""Float32 stays float32: TF32 is off before MLX computes, unless the user has turned it on."""

import os
import subprocess
import sys

import pytest

from mlx_ft.system.precision import TF32

# The C library's environment is the one that MLX reads, and not Python's copy of it.
PROGRAM = """
import ctypes, sys
import mlx_ft
assert "mlx.core" not in sys.modules, "MLX reads it once, when it computes"
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
print(getenv(b"MLX_ENABLE_TF32").decode())
"""


@pytest.mark.parametrize(("users", "expected"), [(None, "0"), ("0", "0"), ("1", "1")])
def test_tf32_is_off_before_mlx_computes(users: str | None, expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != TF32}
    if users is not None:
        environment[TF32] = users
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == expected
