"""Every epoch visits every row once, in an order that depends on the seed and the epoch alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.train.accumulation import padded_groups
from mlx_ft.train.batches import (
    plan_epoch,
    plan_run,
    plan_validation,
    total_iterations,
    total_updates,
)

ROWS = st.integers(1, 200)


@given(ROWS, st.integers(1, 9), st.integers(0, 99), st.integers(0, 9))
def test_an_epoch_visits_every_row_once(rows: int, batch_size: int, seed: int, epoch: int) -> None:
    batches = plan_epoch(rows, batch_size, seed, epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(rows))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert sum(len(batch) < batch_size for batch in batches) <= 1


@given(ROWS, st.integers(1, 9), st.integers(1, 60), st.integers(0, 60))
def test_a_resumed_plan_is_the_rest_of_the_plan(
    rows: int, batch_size: int, iterations: int, start: int
) -> None:
    whole = list(plan_run(rows, batch_size, 7, iterations))
    assert [batch.iteration for batch in whole] == list(range(1, iterations + 1))
    assert list(plan_run(rows, batch_size, 7, iterations, start)) == whole[start:]


def test_batches_drawn_at_random_pad_little() -> None:
    """Where rows cannot be packed each is cut into parts of similar length; mlx-lm pads 25 % and
    more."""
    lengths = np.random.default_rng(0).lognormal(4.5, 0.8, 600).astype(int) + 2
    batches = plan_epoch(len(lengths), 4, 0, 0)
    groups = [group for batch in batches for group in padded_groups(lengths, batch.tolist(), 1024)]
    padded = sum(max(int(lengths[row]) for row in group) * len(group) for group in groups)
    assert 1 - lengths.sum() / padded < 0.03


def test_a_batch_is_as_mixed_as_the_rows() -> None:
    """Long and short rows meet: the spread within batches is that of all rows, less one in four."""
    lengths = np.random.default_rng(0).lognormal(4.5, 0.8, 2000)
    within = np.mean([lengths[batch].var() for batch in plan_epoch(2000, 4, 0, 0)])
    assert within == pytest.approx(0.75 * lengths.var(), rel=0.1)


def test_rows_meet_other_rows_in_another_epoch() -> None:
    first, second = (
        {frozenset(batch.tolist()) for batch in plan_epoch(600, 4, 0, epoch)} for epoch in (0, 1)
    )
    assert len(first & second) < 0.1 * len(first)


def test_epochs_and_seeds_shuffle_differently() -> None:
    plans = [
        np.concatenate(plan_epoch(64, 4, seed, epoch)).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert plans[0] != plans[1] and plans[0] != plans[2] and plans[1] != plans[2]
    assert plans[0] != list(range(64)), "file order is not a shuffle"


def test_counts() -> None:
    assert total_iterations(10, 4, 2, None) == 6
    assert total_iterations(10, 4, None, None) == 6
    assert total_iterations(10, 4, None, 7) == 7
    assert total_updates(10, 4) == 3


def test_validation_is_a_fixed_set_by_length() -> None:
    assert plan_validation([5, 3, 9, 1], 2, -1) == [(3, 1), (0, 2)]
    assert plan_validation([5, 3, 9, 1], 2, 1) == [(1, 0)]


@given(ROWS, st.integers(1, 9), st.integers(0, 9))
def test_without_shuffling_rows_come_as_they_stand_in_every_epoch(
    rows: int, batch_size: int, epoch: int
) -> None:
    batches = plan_epoch(rows, batch_size, 0, epoch, shuffle=False)
    assert np.concatenate(batches).tolist() == list(range(rows))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    whole = list(plan_run(rows, batch_size, 3, 2 * len(batches), shuffle=False))
    again = plan_run(rows, batch_size, 4, 2 * len(batches), len(batches), shuffle=False)
    assert list(again) == whole[len(batches) :]
    assert [b.rows for b in whole[: len(batches)]] == [b.rows for b in whole[len(batches) :]]
