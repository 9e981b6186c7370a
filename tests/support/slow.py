"""Which cases of a family `make test` runs: the first ones; `make test-all` runs them all."""

from collections.abc import Iterable
from typing import Any

import pytest


def fast_first(values: Iterable[Any], fast: int = 1) -> list[Any]:
    """Return parameters for one name, of which all but the first `fast` are marked slow."""
    return fast_rows_first([(value,) for value in values], fast)


def fast_rows_first(rows: Iterable[tuple[Any, ...]], fast: int = 1) -> list[Any]:
    """Return rows of parameters for several names, of which all but the first `fast` are slow."""
    listed = list(rows)
    slow = [pytest.param(*row, marks=pytest.mark.slow) for row in listed[fast:]]
    return [*(pytest.param(*row) for row in listed[:fast]), *slow]
