"""Where things that are fetched or converted once per user live. Does not create anything."""

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
