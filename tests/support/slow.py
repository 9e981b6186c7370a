"""Which cases of a family `make test` runs: the first ones; `make test-all` runs them all."""

from collections.abc import Iterable
from typing import Any

import pytest


def fast_first(values: Iterable[Any], fast: int = 1) -> list[Any]:
    """Return parameters of a test of which all but the first `fast` are marked slow."""
    listed = list(values)
    rest = [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow)
        for v in listed[fast:]
    ]
    return [*listed[:fast], *rest]
