"""The polynomial is exp, to what float32 can hold of its argument."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlx_ft.train.exponential import exp_by_polynomial, exp_of_differences


@given(hnp.arrays(np.float32, st.integers(1, 64), elements=st.floats(-87, 0, width=32)))
def test_it_is_exp(values: np.ndarray) -> None:
    """exp magnifies the rounding of its argument: 87 * 2^-24 is 5e-6, as for any float32 exp."""
    wanted = np.exp(values.astype(np.float64))
    ours = np.array(exp_by_polynomial(mx.array(values)))
    allowed = 1e-6 + np.abs(values) * 2.0**-23
    assert (np.abs(ours / wanted - 1) <= allowed).all()


def test_zero_is_one_within_round_off() -> None:
    assert abs(exp_by_polynomial(mx.zeros(1)).item() - 1) < 2e-7


@pytest.mark.parametrize("value", [-88.0, -1e4, -3e38, float("-inf")])
def test_what_is_too_small_is_next_to_nothing_and_never_negative(value: float) -> None:
    result = exp_by_polynomial(mx.array([value])).item()
    assert 0 <= result <= 2.0**-125


def test_a_value_that_is_no_number_stays_none() -> None:
    """So that a loss that has gone wrong is noticed."""
    assert np.isnan(exp_by_polynomial(mx.array([float("nan")])).item())


def test_where_it_is_chosen_it_agrees_with_mlx() -> None:
    values = -mx.random.uniform(shape=(100,)) * 20
    assert mx.allclose(exp_of_differences(values), mx.exp(values), rtol=5e-6, atol=0).item()
