"""Rows in, token ids out: read, check, render, count, write."""

from mlx_ft.data.prepare import DataSummary, data_inputs, prepare_data

__all__ = ["DataSummary", "data_inputs", "prepare_data"]
