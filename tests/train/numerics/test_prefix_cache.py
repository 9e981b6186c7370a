"""Cached states of the frozen layers are those that a row has alone, within a memory limit."""

import numpy as np
import pytest

from mlx_ft.train.numerics.batch import make_batch
from mlx_ft.train.numerics.prefix_cache import PrefixCache
from tests.support.trainings import Steps, random_rows
from tests.train.conftest import MakeInputs


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_cached_row_is_the_row_alone(make_inputs: MakeInputs, num_layers: int) -> None:
    rows = random_rows(13, seed=1)
    inputs = make_inputs(rows, num_layers=num_layers)
    filled, empty = (PrefixCache(inputs.forward, rows, limit) for limit in (1 << 20, 0))
    steps = Steps()
    filled.fill(steps)
    empty.fill(Steps())
    assert steps.texts[-1] == "frozen layers, rows: 13 of 13"
    hidden_bytes = 64 * 4
    assert filled.held_bytes == hidden_bytes * int((rows.lengths - 1).sum())
    assert empty.held_bytes == 0
    for row in range(len(rows)):
        batch = make_batch(rows, (row,))
        one, other = np.array(filled.batch(batch)), np.array(empty.batch(batch))
        assert one.shape == other.shape == (1, int(rows.lengths[row]) - 1, 64)
        assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()


def test_rows_beyond_the_limit_are_computed_with_their_batch(make_inputs: MakeInputs) -> None:
    """Half of the rows fit: a batch of held and other rows is the same, and padding stays zero."""
    rows = random_rows(13, seed=1)
    inputs = make_inputs(rows)
    whole = PrefixCache(inputs.forward, rows, 1 << 20)
    whole.fill(Steps())
    half = PrefixCache(inputs.forward, rows, whole.held_bytes // 2)
    half.fill(Steps())
    assert half.held_bytes <= whole.held_bytes // 2
    shortest, longest = int(rows.lengths.argmin()), int(rows.lengths.argmax())
    batch = make_batch(rows, (longest, shortest))
    one, other = np.array(half.batch(batch)), np.array(whole.batch(batch))
    assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()
    assert not one[1, int(rows.lengths[shortest]) - 1 :].any()


def test_a_filled_cache_has_the_same_bits_again(make_inputs: MakeInputs) -> None:
    """So that a resumed run continues exactly."""
    rows = random_rows(13, seed=1)
    inputs = make_inputs(rows)
    batch = make_batch(rows, (3, 0, 7, 12))
    bits = set()
    for _ in range(2):
        cache = PrefixCache(inputs.forward, rows, 1 << 20)
        cache.fill(Steps())
        bits.add(np.array(cache.batch(batch)).tobytes())
    assert len(bits) == 1
