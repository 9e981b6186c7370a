"""The last outcome of `mlx-ft doctor`, kept beside the caches, in short for a run's record."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_ft.system.files import read_json, write_json

RESULT_FILE = "doctor.json"


def keep_result(home: Path, document: Mapping[str, Any]) -> None:
    """Keep an outcome in the cache's folder."""
    home.mkdir(parents=True, exist_ok=True)
    write_json(home / RESULT_FILE, {**document, "mlx": metadata.version("mlx")})


def kept_result(home: Path) -> dict[str, Any] | None:
    """Return date and statuses of the last outcome; None where there is none that can be read.

    stale: MLX has another version now.
    """
    try:
        document = read_json(home / RESULT_FILE)
        checks = {check["name"]: check["status"] for check in document["checks"]}
        return {
            "date": document["date"],
            "status": document["status"],
            "checks": checks,
            "mlx": document["mlx"],
            "stale": document["mlx"] != metadata.version("mlx"),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None
