"""exp for a softmax, at the speed of plain arithmetic where MLX's own is slow.

MLX's exp takes about 20 ns an element on an x86 CPU, one element at a time; additions and
multiplications take 0.6 ns. Over a vocabulary this is a large share of a step. Everywhere else (on
Metal above all) MLX's own is used.
"""

from __future__ import annotations

import platform

import mlx.core as mx

from mlx_ft.inference import on_cpu

LOG2_E = 1.4426950408889634
SMALLEST_EXPONENT = -126.0
# 2 ** f for f in [-0.5, 0.5], highest power first: least squares of the relative error at 2,001
# Chebyshev points, at most 1.2e-7 off; float32 itself resolves 6e-8.
POWERS = (
    1.326697992383205e-3,
    9.675469395324987e-3,
    5.550742675409218e-2,
    2.4022121576229327e-1,
    6.931469490692199e-1,
    1.0000000710651666,
)
FLOAT32_EXPONENT_UNIT = float(1 << 23)


def exp_of_differences(values: mx.array) -> mx.array:
    """Return exp(values) of float32 values that are zero or less, within 2e-6 of the result.

    No gradient passes through the polynomial. What would be below 2 ** -126 becomes that.
    """
    if not (on_cpu() and platform.machine() in ("x86_64", "AMD64")):
        return mx.exp(values)
    return exp_by_polynomial(values)


def exp_by_polynomial(values: mx.array) -> mx.array:
    """Return exp of float32 values <= 0 as 2 ** n * 2 ** f, n whole: n goes into the exponent bits
    of the float that is 2 ** f.
    """
    exponent = mx.maximum(values * LOG2_E, SMALLEST_EXPONENT)
    whole = mx.round(exponent)
    fraction = exponent - whole
    power = POWERS[0] * fraction + POWERS[1]
    for coefficient in POWERS[2:]:
        power = power * fraction + coefficient
    shift = (whole * FLOAT32_EXPONENT_UNIT).astype(mx.int32)
    result: mx.array = mx.view(mx.view(power, mx.int32) + shift, mx.float32)
    return result
