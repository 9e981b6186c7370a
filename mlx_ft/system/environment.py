"""Versions, machine and source commit recorded with a run. No secrets, no variables."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_ft import BLAS, __version__
from mlx_ft.system.cache import cache_home
from mlx_ft.system.doctor_result import kept_result
from mlx_ft.system.hardware import machine

PACKAGES = ("mlx", "mlx-lm", "transformers", "numpy", "huggingface_hub")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Return git's answer about this package's own source, or None where it is not a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Return versions and machine as plain JSON.

    dirty: the source has uncommitted changes. doctor: the last outcome of `mlx-ft doctor` here.
    """
    facts = machine()
    changes = _git("status", "--porcelain")
    return {
        "mlx_ft": __version__,
        **{package.replace("-", "_"): _version(package) for package in PACKAGES},
        "python": facts.python,
        "platform": platform.platform(),
        "machine": facts.processor,
        "cores": facts.cores,
        "memory_bytes": facts.memory_bytes,
        "blas": BLAS.name,
        "device": "Apple GPU (Metal)" if facts.system == "Darwin" else f"CPU with {BLAS.name}",
        "doctor": kept_result(cache_home()),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }
