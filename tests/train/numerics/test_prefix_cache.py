"""Cached states of the frozen layers are those that a row has alone, within a memory limit."""

import numpy as np
import pytest

from mlx_ft.train.numerics.losses import make_batch
from mlx_ft.train.numerics.prefix_cache import PrefixCache
from tests.support.trainings import random_rows
from tests.train.conftest import MakeJob


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_cached_row_is_the_row_alone(make_job: MakeJob, num_layers: int) -> None:
    rows = random_rows(13, seed=1)
    job = make_job(rows, num_layers=num_layers)
    filled, empty = (PrefixCache(job.forward, rows, limit) for limit in (1 << 20, 0))
    told: list[tuple[int, int]] = []
    filled.fill(lambda done, of: told.append((done, of)))
    empty.fill(lambda done, of: None)
    assert told[-1] == (13, 13)
    hidden_bytes = 64 * 4
    assert filled.held_bytes == hidden_bytes * int((rows.lengths - 1).sum())
    assert empty.held_bytes == 0
    for row in range(len(rows)):
        batch = make_batch(rows, (row,))
        one, other = np.array(filled.batch(batch)), np.array(empty.batch(batch))
        assert one.shape == other.shape == (1, int(rows.lengths[row]) - 1, 64)
        assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()


def test_rows_beyond_the_limit_are_computed_with_their_batch(make_job: MakeJob) -> None:
    """Half of the rows fit: a batch of held and other rows is the same, and padding stays zero."""
    rows = random_rows(13, seed=1)
    job = make_job(rows)
    whole = PrefixCache(job.forward, rows, 1 << 20)
    whole.fill(lambda done, of: None)
    half = PrefixCache(job.forward, rows, whole.held_bytes // 2)
    half.fill(lambda done, of: None)
    assert half.held_bytes <= whole.held_bytes // 2
    shortest, longest = int(rows.lengths.argmin()), int(rows.lengths.argmax())
    batch = make_batch(rows, (longest, shortest))
    one, other = np.array(half.batch(batch)), np.array(whole.batch(batch))
    assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()
    assert not one[1, int(rows.lengths[shortest]) - 1 :].any()


def test_a_filled_cache_has_the_same_bits_again(make_job: MakeJob) -> None:
    """So that a resumed run continues exactly."""
    rows = random_rows(13, seed=1)
    job = make_job(rows)
    batch = make_batch(rows, (3, 0, 7, 12))
    bits = set()
    for _ in range(2):
        cache = PrefixCache(job.forward, rows, 1 << 20)
        cache.fill(lambda done, of: None)
        bits.add(np.array(cache.batch(batch)).tobytes())
    assert len(bits) == 1
