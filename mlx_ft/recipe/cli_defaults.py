"""Defaults that the command line shows too; importing them loads no pydantic."""

from __future__ import annotations

DEFAULT_DATE = "2025-01-01"
# As mlx_lm.batch_generate has it; on a CPU, a prompt then costs two thirds of what it does with 16.
DEFAULT_BATCH_SIZE = 32
