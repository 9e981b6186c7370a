"""A function with a gradient of its own is differentiated by it, and by nothing else."""

import mlx.core as mx

from mlx_ft.train.numerics.custom_vjp import with_gradient


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
