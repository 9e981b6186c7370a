"""The folder of the per-user cache: fetched and converted files. Does not create it."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_HOME_VARIABLE = "MLX_FT_HOME"


def cache_home() -> Path:
    """Return `$MLX_FT_HOME`, or `~/.cache/mlx-ft` when it is not set."""
    configured = os.environ.get(CACHE_HOME_VARIABLE)
    if configured:
        return Path(configured).expanduser().resolve()
    return Path("~/.cache/mlx-ft").expanduser()
