"""The polynomial is exp, and gates made of it are mlx-lm's, to what float32 can hold."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mlx_lm.models import activations, base, llama

from mlx_ft.engine.cpu_kernels import (
    BLOCK_QUERIES,
    attention,
    exp_by_polynomial,
    exp_is_slow,
    exp_of_differences,
    fast_math,
    sigmoid_by_polynomial,
    swiglu,
)
from mlx_ft.engine.load import load_weights, scalar
from tests.support.models import write_tiny_model


@given(hnp.arrays(np.float32, st.integers(1, 64), elements=st.floats(-44, 0, width=32)))
def test_it_is_exp(values: np.ndarray) -> None:
    """exp magnifies the rounding of its argument: 44 * 2^-24 is 3e-6, as for any float32 exp."""
    wanted = np.exp(values.astype(np.float64))
    ours = np.array(exp_by_polynomial(mx.array(values)))
    allowed = 1e-6 + np.abs(values) * 2.0**-23
    assert (np.abs(ours / wanted - 1) <= allowed).all()


def test_zero_is_one_within_round_off() -> None:
    assert abs(exp_by_polynomial(mx.zeros(1)).item() - 1) < 2e-7


@pytest.mark.parametrize("value", [-45.0, -1e4, -3e38, float("-inf")])
def test_what_is_too_small_is_next_to_nothing_and_never_negative(value: float) -> None:
    result = scalar(exp_by_polynomial(mx.array([value])))
    assert 0 <= result <= 2.0**-63


def test_a_value_that_is_no_number_stays_none() -> None:
    """So that a loss that has gone wrong is noticed."""
    assert np.isnan(exp_by_polynomial(mx.array([float("nan")])).item())


def test_where_it_is_chosen_it_agrees_with_mlx() -> None:
    values = -mx.random.uniform(shape=(100,)) * 20
    assert mx.allclose(exp_of_differences(values), mx.exp(values), rtol=5e-6, atol=0).item()


@given(hnp.arrays(np.float32, st.integers(1, 64), elements=st.floats(-1e4, 1e4, width=32)))
def test_it_is_the_logistic_function(values: np.ndarray) -> None:
    wanted = 1 / (1 + np.exp(-values.astype(np.float64).clip(-700, 700)))
    ours = np.array(sigmoid_by_polynomial(mx.array(values)))
    assert np.abs(ours - wanted).max() <= 5e-7
    assert ((ours >= 0) & (ours <= 1)).all()


def test_a_gate_has_the_values_and_gradients_of_mlx_lm() -> None:
    mx.random.seed(0)
    gate, values = mx.random.normal((64, 32)) * 4, mx.random.normal((64, 32))
    slope = mx.random.normal((64, 32))
    (theirs,), their_gradients = mx.vjp(
        lambda g, v: activations.swiglu(g, v), [gate, values], [slope]
    )
    (ours,), our_gradients = mx.vjp(swiglu, [gate, values], [slope])
    for one, other in zip((ours, *our_gradients), (theirs, *their_gradients), strict=True):
        assert mx.allclose(one, other, rtol=1e-5, atol=1e-5).item()


def masks(tokens: int, seen: int) -> list[mx.array | str | None]:
    """One of each kind that mlx-lm's models hand to attention."""
    window = base.create_causal_mask(tokens, offset=seen - tokens, window_size=3)
    added = mx.where(window, 0.0, -1e9)
    return [None, "causal", window, window[None, None], added[None, None]]


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize(
    ("tokens", "seen"), [(7, 7), (5, 9), (1, 6), (2 * BLOCK_QUERIES + 3,) * 2, (BLOCK_QUERIES, 200)]
)
def test_attention_has_the_values_and_gradients_of_mlx_lm(
    kind: int, tokens: int, seen: int
) -> None:
    mx.random.seed(kind)
    shapes = ((2, 6, tokens, 8), (2, 3, seen, 8), (2, 3, seen, 8))
    arrays = [mx.random.normal(shape) * 3 for shape in shapes]
    slope = mx.random.normal(shapes[0])
    results = []
    for function in (base.scaled_dot_product_attention, attention):

        def call(q: mx.array, k: mx.array, v: mx.array, f: Any = function) -> mx.array:
            result: mx.array = f(q, k, v, None, 0.35, masks(tokens, seen)[kind])
            return result

        (output,), gradients = mx.vjp(call, arrays, [slope])
        results.append((output, *gradients))
    for theirs, ours in zip(*results, strict=True):
        assert mx.abs(ours - theirs).max() <= 5e-6 * mx.abs(theirs).max()


def test_other_types_are_left_to_mlx_lm() -> None:
    gate = mx.random.normal((4, 4)).astype(mx.bfloat16)
    assert mx.array_equal(swiglu(gate, gate), activations.swiglu(gate, gate)).item()
    rows = gate.reshape(1, 1, 4, 4)
    ours, theirs = (
        function(rows, rows, rows, None, 1.0, "causal")
        for function in (attention, base.scaled_dot_product_attention)
    )
    assert mx.array_equal(ours, theirs).item()


def test_a_models_gates_are_fast_for_a_while_and_its_own_afterwards(tmp_path: Path) -> None:
    model, _, _ = load_weights(write_tiny_model(tmp_path))
    ids = mx.array([[5, 6, 7, 8]])
    plain = model(ids)
    with fast_math(model.model):
        assert (llama.swiglu is swiglu) == exp_is_slow()
        fast = model(ids)
    assert llama.swiglu is activations.swiglu
    assert mx.allclose(fast, plain, rtol=1e-4, atol=1e-5).item()
