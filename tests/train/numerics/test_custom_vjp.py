"""Taking positions out and putting them back is MLX's own indexing, gradients included."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.train.numerics.custom_vjp import put, take, with_gradient

WIDTH = 3
Function = Callable[[mx.array], mx.array]


@given(data=st.data(), tokens=st.integers(1, 20))
def test_values_and_gradients_are_those_of_indexing(data: st.DataObject, tokens: int) -> None:
    positions = mx.array(
        data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, unique=True)), mx.int32
    )
    everywhere = mx.random.normal((tokens, WIDTH))
    few = mx.random.normal((positions.size, WIDTH))
    same_as(lambda x: take(x, positions), lambda x: x[positions], everywhere, few)
    same_as(
        lambda x: put(x, positions, tokens),
        lambda x: mx.zeros((tokens, WIDTH)).at[positions].add(x),
        few,
        everywhere,
    )


def same_as(ours: Function, theirs: Function, values: mx.array, slope: mx.array) -> None:
    """Compare outputs and gradients of two functions, bit for bit."""
    results = [mx.vjp(function, [values], [slope]) for function in (ours, theirs)]
    for one, other in zip(*results, strict=True):
        assert np.array_equal(np.array(one[0]), np.array(other[0]))


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16])
def test_other_types_stay_what_they_are(kind: mx.Dtype) -> None:
    values, positions = mx.ones((4, WIDTH), kind), mx.array([2, 0])
    taken = take(values, positions)
    assert taken.dtype == put(taken, positions, 4).dtype == kind


def test_no_position_is_nothing() -> None:
    values, none = mx.ones((4, WIDTH)), mx.zeros((0,), mx.int32)
    assert take(values, none).shape == (0, WIDTH)
    gradient = mx.grad(lambda x: take(x, none).sum())(values)
    assert not mx.any(gradient).item()


def test_one_array_and_two() -> None:
    doubled = with_gradient(lambda x: 2 * x, lambda inputs, slope: (slope * 5 + inputs[0],))
    assert doubled(mx.array(3.0)).item() == 6
    assert mx.grad(lambda x: doubled(x) * 10)(mx.array(3.0)).item() == 53
    product = with_gradient(lambda x, y: x * y, lambda inputs, slope: (slope, slope * inputs[0]))
    one, other = mx.grad(lambda x, y: product(x, y), argnums=(0, 1))(mx.array(3.0), mx.array(4.0))
    assert (one.item(), other.item()) == (1, 3)


def test_what_is_taken_from_elsewhere_has_none() -> None:
    def of(factor: mx.array) -> mx.array:
        return with_gradient(lambda x: x * factor, lambda _, slope: (slope,))(mx.array(3.0))

    assert mx.grad(of)(mx.array(4.0)).item() == 0
