"""Curriculum order: the order of rows that a recipe does not want shuffled.

Does not: form batches (`train/batches.py`), or sort a file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_ft.data.rows import Row
from mlx_ft.recipe.schema import DataRecipe


def training_order(rows: Sequence[Row], lengths: Sequence[int], data: DataRecipe) -> list[int]:
    """Return the indices of the rows in the order that the recipe wants, ties as in the file.

    Rows that stand in no file have no place of their own in it: they are spread evenly.
    """
    if data.order == "length":
        order: list[int] = np.argsort(lengths, kind="stable").tolist()
        return order
    own = [index for index, row in enumerate(rows) if row.line > 0]
    if data.order_field is not None:
        own.sort(key=lambda index: rows[index].order)  # type: ignore[arg-type,return-value]  # all of one type, or read_rows complains
    others = [index for index, row in enumerate(rows) if row.line <= 0]
    return spread(own, others)


def spread(own: Sequence[int], others: Sequence[int]) -> list[int]:
    """Return both lists as one, each in its own order and evenly over the whole."""
    placed = [((place + 0.5) / len(own), 0, index) for place, index in enumerate(own)]
    placed += [((place + 0.5) / len(others), 1, index) for place, index in enumerate(others)]
    return [index for _, _, index in sorted(placed, key=lambda item: item[:2])]
