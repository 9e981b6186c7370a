"""A step's gradient is one sum, however its rows go through the model; what is not finite is not
applied.
"""

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_ft.engine.load import scalar
from mlx_ft.train.accumulation import (
    GROUP_COST_TOKENS,
    OPTIMIZERS,
    GradientWindow,
    StepForm,
    build_optimizer,
    gradient_norm,
    micro_batches,
    padded_groups,
)
from mlx_ft.train.contract import TrainingInputs
from mlx_ft.train.numerics.batch import Batch, make_batch
from mlx_ft.train.numerics.losses import cross_entropy_sum
from mlx_ft.train.numerics.prefix_cache import PrefixCache
from tests.support.trainings import random_rows
from tests.train.conftest import MakeInputs

Arrays = dict[str, np.ndarray]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(1, 700))
def test_padded_groups_hold_every_row_once_within_the_limit(lengths: list[int], limit: int) -> None:
    rows = list(range(len(lengths)))[::-1]
    groups = padded_groups(np.array(lengths), rows, limit)
    assert sorted(row for group in groups for row in group) == sorted(rows)
    for group in groups:
        padded = max(lengths[row] for row in group) * len(group)
        assert padded <= limit or len(group) == 1


@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.integers(1, 300))
def test_no_other_cut_pads_less_for_its_number_of_parts(lengths: list[int], limit: int) -> None:
    """Compared with every way to cut the sorted rows."""

    def cost(groups: Sequence[Sequence[int]]) -> float:
        sizes = [max(lengths[row] for row in group) * len(group) for group in groups]
        too_large = any(s > limit and len(g) > 1 for s, g in zip(sizes, groups, strict=True))
        return float("inf") if too_large else sum(sizes) + GROUP_COST_TOKENS * len(groups)

    ordered = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    ways = []
    for cuts in range(2 ** (len(ordered) - 1)):
        groups: list[list[int]] = [[]]
        for place, row in enumerate(ordered):
            groups[-1].append(row)
            if cuts >> place & 1:
                groups.append([])
        ways.append(cost([group for group in groups if group]))
    found = padded_groups(np.array(lengths), range(len(lengths)), limit)
    assert cost(found) == min(ways)


def window_of(
    inputs: TrainingInputs,
    max_norm: float | None = None,
    optimizer: optimizers.Optimizer | None = None,
) -> GradientWindow:
    def loss(batch: Batch, prefix: mx.array) -> mx.array:
        return cross_entropy_sum(inputs.forward, batch, prefix)

    optimizer = optimizer or optimizers.SGD(learning_rate=1.0)
    optimizer.init(inputs.model.trainable_parameters())
    form = StepForm.of(inputs.recipe, inputs.forward)
    return GradientWindow(inputs.model, loss, optimizer, max_norm, form)


def adapter_of(inputs: TrainingInputs) -> Arrays:
    return {n: np.array(a) for n, a in tree_flatten(inputs.model.trainable_parameters())}


def change(
    inputs: TrainingInputs, limit: int, max_norm: float | None = None
) -> tuple[float, Arrays]:
    """Update once on all rows by SGD at rate 1; return the gradient's norm and the change."""
    before = adapter_of(inputs)
    window = window_of(inputs, max_norm)
    cache = PrefixCache(inputs.forward, inputs.train_rows, 1 << 20)
    for batch in micro_batches(inputs.train_rows, range(len(inputs.train_rows)), 0, limit):
        window.add(batch, cache.batch(batch))
    update = window.update(1.0)
    assert update.applied
    after = adapter_of(inputs)
    return update.gradient_norm, {name: after[name] - before[name] for name in after}


def test_micro_batches_change_nothing_beyond_round_off(make_inputs: MakeInputs) -> None:
    rows = random_rows(9, seed=3)
    norm, whole = change(make_inputs(rows), 10**6)
    for limit in (1, 40, 100):
        other_norm, parts = change(make_inputs(rows), limit)
        assert other_norm == pytest.approx(norm, rel=1e-5)
        for name, value in whole.items():
            assert np.abs(parts[name] - value).max() <= 1e-5 * norm


def test_the_norm_is_that_of_the_mean_gradient(make_inputs: MakeInputs) -> None:
    norm, moved = change(make_inputs(random_rows(5, seed=3)), 10**6)
    together = math.sqrt(sum(float(np.square(value).sum()) for value in moved.values()))
    assert together == pytest.approx(norm, rel=1e-4)


def test_a_long_gradient_is_scaled_down_and_a_short_one_left(make_inputs: MakeInputs) -> None:
    rows = random_rows(5, seed=3)
    norm, free = change(make_inputs(rows), 10**6)
    for limit in (norm / 4, norm * 4):
        said, clipped = change(make_inputs(rows), 10**6, limit)
        assert said == norm, "the norm that is told is the one before clipping"
        share = min(1.0, limit / norm)
        for name, value in free.items():
            assert np.abs(clipped[name] - share * value).max() <= 1e-5 * norm


def test_what_is_not_finite_is_not_applied_and_a_new_window_begins(make_inputs: MakeInputs) -> None:
    inputs = make_inputs(random_rows(5, seed=3))
    before = adapter_of(inputs)
    window = window_of(inputs)
    batch = make_batch(inputs.train_rows, (0, 1))
    prefix = PrefixCache(inputs.forward, inputs.train_rows, 1 << 20).batch(batch)
    assert not math.isfinite(scalar(window.add(batch, prefix * math.nan)))
    assert window.rows == (0, 1)
    update = window.update(1.0)
    assert not update.applied and not math.isfinite(update.gradient_norm)
    for name, value in adapter_of(inputs).items():
        assert value.tobytes() == before[name].tobytes()
    window.add(batch, prefix)
    assert window.rows == (0, 1) and window.update(1.0).applied


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_a_first_update_is_in_proportion_to_the_learning_rate(
    make_inputs: MakeInputs, optimizer: str
) -> None:
    """The rate that is reported is the one that is used, Adafactor's too."""
    inputs = make_inputs(random_rows(5, seed=3), optimizer=optimizer)
    prefix = PrefixCache(inputs.forward, inputs.train_rows, 1 << 20)
    before = dict(tree_flatten(inputs.model.trainable_parameters()))
    moved = {}
    for rate in (1e-2, 1e-3):
        inputs.model.load_weights(list(before.items()), strict=False)
        window = window_of(inputs, optimizer=build_optimizer(inputs.recipe))
        batch = make_batch(inputs.train_rows, (0, 1, 2))
        window.add(batch, prefix.batch(batch))
        window.update(rate)
        after = adapter_of(inputs)
        moved[rate] = {name: after[name] - np.array(before[name]) for name in after}
    assert any(np.abs(value).max() > 0 for value in moved[1e-2].values())
    for name, value in moved[1e-2].items():
        assert np.abs(value - 10 * moved[1e-3][name]).max() <= 1e-3 * np.abs(value).max() + 1e-6


def test_the_norm_counts_every_array() -> None:
    gradient = {"a": mx.array([3.0]), "b": [mx.array([[4.0]]), {"c": mx.array([12.0])}]}
    assert gradient_norm(gradient).item() == 13.0


def test_value_and_grad_is_the_same_loss(make_inputs: MakeInputs) -> None:
    inputs = make_inputs(random_rows(4, seed=3))
    batch = make_batch(inputs.train_rows, (0, 1, 2))
    prefix = PrefixCache(inputs.forward, inputs.train_rows, 1 << 20).batch(batch)
    logits = inputs.model(batch.ids)
    picked = logits.reshape(-1, logits.shape[-1])[batch.positions]
    plain = nn.losses.cross_entropy(picked, batch.targets, reduction="sum")
    assert scalar(window_of(inputs).add(batch, prefix)) == pytest.approx(plain.item(), rel=1e-5)
