"""Load a fast BLAS before MLX on Linux.

Does: find the OpenBLAS of the `ngsolve-openblas` wheel (or of the system). Load it into the global
symbol scope before MLX is imported, so that `cblas_sgemm` is OpenBLAS's and not the reference one.
Does not: import MLX, change anything on macOS (Accelerate and Metal need no help), or fail. Without
OpenBLAS everything works, about eighty times slower, and `BlasStatus.detail` says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from mlx_ft.system.cache import cache_home


@dataclass(frozen=True)
class BlasStatus:
    """Which BLAS serves MLX on the CPU: `name` for people, `fast` for decisions, `detail` why."""

    name: str
    fast: bool
    detail: str


def _package_folders(name: str) -> list[Path]:
    """Return the folders of a package; of one without __init__.py, as MLX's, there may be several,
    and any folder of its name beside a script is one.
    """
    spec = util.find_spec(name)
    return [] if spec is None else [Path(each) for each in spec.submodule_search_locations or ()]


def _link(folder: Path, name: str, target: Path) -> None:
    """Make `folder/name` point at `target`, safely beside other processes that do the same."""
    link = folder / name
    if link.is_symlink() and link.resolve() == target.resolve():
        return
    fresh = folder / f"{name}.{os.getpid()}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


def _wheel_library() -> Path | None:
    """Return a loadable path of the wheel's OpenBLAS, or None if it is not installed.

    The wheel's library looks for `libgfortran.so.5` beside itself and does not bring it. A bare
    Linux has none either, but the MLX wheel carries one under another file name. A cache folder of
    symbolic links puts the two side by side without touching installed packages.
    """
    libraries = [
        library
        for folder in _package_folders("ngsolve_openblas")
        for library in sorted(folder.glob("libopenblas*.so"))
    ]
    fortran = [
        library
        for folder in _package_folders("mlx")
        for library in sorted((folder.parent / "mlx_cpu.libs").glob("libgfortran*.so*"))
    ]
    if not libraries or not fortran:
        return None
    runtime_folder = fortran[0].parent
    identity = hashlib.sha256(f"{libraries[0]}\n{fortran[0]}".encode()).hexdigest()[:16]
    folder = cache_home() / "blas" / identity
    folder.mkdir(parents=True, exist_ok=True)
    _link(folder, "libgfortran.so.5", fortran[0])
    for quadmath in runtime_folder.glob("libquadmath*.so*"):
        _link(folder, quadmath.name, quadmath)
    _link(folder, "libopenblas.so.0", libraries[0])
    return folder / "libopenblas.so.0"


def preload_openblas() -> BlasStatus:
    """Load OpenBLAS globally on Linux, unless MLX is already imported. Never raises."""
    if sys.platform != "linux":
        return BlasStatus("platform", True, "Accelerate and Metal")
    if "mlx.core" in sys.modules:
        return BlasStatus(
            "unknown", False, "mlx was imported before mlx_ft, too late to choose its BLAS"
        )
    tried = []
    try:
        wheel = _wheel_library()
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home folder
        wheel = None
        tried.append(f"cache folder: {error}")
    for candidate in filter(None, (str(wheel) if wheel else None, "libopenblas.so.0")):
        try:
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            tried.append(str(error))
        else:
            return BlasStatus("OpenBLAS", True, candidate)
    return BlasStatus("reference BLAS", False, "; ".join(tried) or "OpenBLAS is not installed")
