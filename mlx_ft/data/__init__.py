"""Rows in, token ids out: read, check, render, count, write."""

from mlx_ft.data.prepare import DataSummary, prepare_data
from mlx_ft.data.sources import data_inputs

__all__ = ["DataSummary", "data_inputs", "prepare_data"]
