"""Names of the evaluation columns: the models that a run measures. Imports no pydantic.

The only home of these names, light enough for `mlx-ft --help`.
"""

from __future__ import annotations

from typing import Literal

ColumnName = Literal["base", "adapter", "fused", "quantized"]
BASE: Literal["base"] = "base"
ADAPTER: Literal["adapter"] = "adapter"
FUSED: Literal["fused"] = "fused"
QUANTIZED: Literal["quantized"] = "quantized"
# In the order in which a run makes them.
COLUMNS: tuple[ColumnName, ...] = (BASE, ADAPTER, FUSED, QUANTIZED)
# Columns that the export stage writes as model folders.
EXPORTED: tuple[ColumnName, ...] = (FUSED, QUANTIZED)
# The model that leaves a run, where no column is named.
DEFAULT_COLUMN: ColumnName = QUANTIZED
