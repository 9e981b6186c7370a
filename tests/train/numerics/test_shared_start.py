"""Rows continued from their common start have the states that they have as a whole."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ft.data.tokens import TokenizedSplit, pack_rows
from mlx_ft.engine.load import load_weights
from mlx_ft.train import trainer
from mlx_ft.train.contract import TrainingInputs
from mlx_ft.train.numerics.batch import make_batch
from mlx_ft.train.numerics.forward import SplitForward, choose_forward
from mlx_ft.train.numerics.losses import cross_entropy_sum
from mlx_ft.train.numerics.prefix_cache import PrefixCache
from mlx_ft.train.numerics.shared_start import (
    SharedStart,
    choose_start,
    common_start,
    first_predicting,
)
from tests.support.models import write_tiny_model
from tests.support.trainings import random_rows, train_here
from tests.train.conftest import MakeInputs


def rows_with_start(tokens: int, count: int = 7) -> TokenizedSplit:
    start = np.arange(10, 10 + tokens, dtype=np.int32)
    tails = random_rows(count, seed=6)
    rows = []
    for index in range(count):
        ids, trained = tails.row(index)
        rows.append(
            (np.concatenate([start, ids]), np.concatenate([np.zeros(tokens, np.uint8), trained]))
        )
    return pack_rows(rows, list(range(1, count + 1)))


def test_the_common_start_is_what_all_rows_share() -> None:
    assert common_start([rows_with_start(12)])[:12] == list(range(10, 22))
    assert len(common_start([rows_with_start(12)])) < 16
    assert common_start([random_rows(20, seed=1)]) == []
    same = pack_rows([(np.arange(9, dtype=np.int32), np.ones(9, np.uint8))] * 2, [1, 2])
    both = common_start([rows_with_start(12), rows_with_start(9)])
    assert both == list(range(10, 19)), "the start of one split is that of the other too"
    assert len(common_start([same])) == 7, "every row keeps something of its own to predict"


@pytest.mark.parametrize("num_layers", [1, 2])
def test_continued_is_whole(make_inputs: MakeInputs, num_layers: int) -> None:
    rows = rows_with_start(12)
    inputs = make_inputs(rows, num_layers=num_layers)
    start = choose_start(inputs.model, inputs.forward, [rows])
    assert start is not None and start.tokens >= 12
    continued = PrefixCache(inputs.forward, rows, 1 << 20, start)
    whole = PrefixCache(inputs.forward, rows, 1 << 20)
    for row in range(len(rows)):
        batch = make_batch(rows, (row,))
        one, other = np.array(continued.batch(batch)), np.array(whole.batch(batch))
        assert one.shape == other.shape
        assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()


def test_no_start_where_it_would_not_pay_or_not_hold(
    make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = rows_with_start(3)
    assert choose_start(make_inputs(short).model, make_inputs(short).forward, [short]) is None
    rows = rows_with_start(12)
    all_layers = make_inputs(rows, num_layers=3)
    assert choose_start(all_layers.model, all_layers.forward, [rows]) is None
    inputs = make_inputs(rows)
    right = SplitForward.prefix_after
    monkeypatch.setattr(
        SplitForward, "prefix_after", lambda self, ids, caches: right(self, ids, caches) * 1.01
    )
    assert choose_start(inputs.model, inputs.forward, [rows]) is None, "a wrong start is found out"


def test_a_model_that_asks_for_its_mask_goes_on_from_a_start(tmp_path: Path) -> None:
    """Gemma 2 wants an array, which says what a token sees of the recorded ones as well."""
    folder = write_tiny_model(tmp_path, "gemma2", layers=3)
    model, _, _ = load_weights(folder)
    model.freeze()
    rows = rows_with_start(12)
    forward = choose_forward(model, 2, [rows.row(0)[0].tolist()])
    start = choose_start(model, forward, [rows])
    assert start is not None and start.tokens >= 12
    ids = mx.array(rows.row(3)[0][None, :-1])
    one, other = np.array(start.rows(ids)), np.array(forward.prefix(ids))
    assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()


def test_a_start_that_a_model_cannot_go_on_from_is_not_taken(
    make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_with_start(12)
    inputs = make_inputs(rows)

    def refuse(*_: object) -> None:
        raise ValueError("no such shapes")

    monkeypatch.setattr(SplitForward, "prefix_after", refuse)
    assert choose_start(inputs.model, inputs.forward, [rows]) is None


def test_training_from_a_shared_start_learns_the_same(
    make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_with_start(12)
    settings = {"learning_rate": 1e-3, "validation_rows": rows_with_start(12, count=3)}
    with_start = make_inputs(rows, "with", **settings)
    splits = (with_start.train_rows, with_start.validation_rows)
    assert choose_start(with_start.model, with_start.forward, splits) is not None
    train_here(with_start)
    without = make_inputs(rows, "without", **settings)
    monkeypatch.setattr(trainer, "choose_start", lambda *arguments: None)
    train_here(without)
    one = dict(tree_flatten(with_start.model.trainable_parameters()))
    other = dict(tree_flatten(without.model.trainable_parameters()))
    largest = max(float(mx.abs(a).max()) for a in other.values())
    for name in one:
        assert float(mx.abs(one[name] - other[name]).max()) < 1e-3 * largest


def gradient_of(inputs: TrainingInputs, shared: int | None) -> tuple[float, dict[str, mx.array]]:
    cache = PrefixCache(inputs.forward, inputs.train_rows, 1 << 20)
    batch = make_batch(inputs.train_rows, (0, 2, 3, 5), shared)
    loss, gradient = nn.value_and_grad(
        inputs.model, lambda: cross_entropy_sum(inputs.forward, batch, cache.batch(batch))
    )()
    return float(loss), dict(tree_flatten(gradient))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_sharing_the_start_within_a_batch_changes_no_gradient(
    make_inputs: MakeInputs, num_layers: int
) -> None:
    """The trained layers see the start once; its keys and values still get every row's gradient."""
    rows = rows_with_start(12)
    inputs = make_inputs(rows, num_layers=num_layers)
    mx.random.seed(5)
    inputs.model.load_weights(
        [
            (name, mx.random.normal(array.shape) * 0.1)
            for name, array in tree_flatten(inputs.model.trainable_parameters())
        ],
        strict=False,
    )
    loss, reference = gradient_of(inputs, None)
    assert first_predicting([rows]) >= 12
    for shared in (0, 1, 7, 12):
        shared_loss, ours = gradient_of(inputs, shared)
        assert shared_loss == pytest.approx(loss, rel=1e-5)
        largest = max(float(mx.abs(array).max()) for array in reference.values())
        for name, array in reference.items():
            assert float(mx.abs(ours[name] - array).max()) < 1e-5 * largest


def test_what_predicts_is_not_shared() -> None:
    trained = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], np.uint8)
    rows = pack_rows([(np.arange(12, dtype=np.int32), trained)] * 3, [1, 2, 3])
    assert first_predicting([rows]) == 2


def test_the_start_has_one_state_a_token(make_inputs: MakeInputs) -> None:
    inputs = make_inputs(rows_with_start(12))
    assert isinstance(inputs.forward, SplitForward)
    start = SharedStart(inputs.forward, list(range(10, 20)))
    assert start.states.shape == (10, 64)
