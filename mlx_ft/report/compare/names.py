"""`mlx-ft compare`: names of its formats. Imports nothing."""

from __future__ import annotations

from typing import Literal, get_args

Format = Literal["text", "markdown", "csv", "json", "html"]
FORMATS: tuple[Format, ...] = get_args(Format)
