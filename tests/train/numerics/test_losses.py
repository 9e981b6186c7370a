"""The loss and its gradient are those of a plain, slow reference, whatever the batching."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.trainer import default_loss

from mlx_ft.data.tokens import TokenizedSplit, pack_rows
from mlx_ft.engine.cpu_kernels import exp_is_slow
from mlx_ft.recipe.train import LOGITS_PART_BYTES
from mlx_ft.train.contract import TrainingInputs
from mlx_ft.train.numerics import losses
from mlx_ft.train.numerics.batch import make_batch
from mlx_ft.train.numerics.forward import choose_forward
from mlx_ft.train.numerics.losses import cross_entropy_sum
from mlx_ft.train.numerics.prefix_cache import PrefixCache
from tests.support.trainings import random_rows
from tests.train.conftest import MakeInputs


def _wake_adapter(inputs: TrainingInputs) -> None:
    """Give the adapter's second matrix, which starts at zero, numbers of its own."""
    mx.random.seed(5)
    weights = [
        (name, mx.random.normal(array.shape) * 0.1 if name.endswith("lora_b") else array)
        for name, array in tree_flatten(inputs.model.trainable_parameters())
    ]
    inputs.model.load_weights(weights, strict=False)


def _reference(inputs: TrainingInputs, rows: tuple[int, ...]) -> tuple[float, int]:
    """Row by row, token by token, from the plain model's full logits."""
    total, count = 0.0, 0
    for row in rows:
        ids, trained = inputs.train_rows.row(row)
        logits = np.array(inputs.model(mx.array(ids[None])).astype(mx.float32))[0].astype(
            np.float64
        )
        for position in range(1, len(ids)):
            if trained[position]:
                scores = logits[position - 1]
                log_total = np.log(np.exp(scores - scores.max()).sum()) + scores.max()
                total += log_total - scores[ids[position]]
                count += 1
    return total, count


def _ours(inputs: TrainingInputs, rows: tuple[int, ...]) -> tuple[mx.array, dict[str, mx.array]]:
    cache = PrefixCache(inputs.forward, inputs.train_rows, 1 << 20)
    batch = make_batch(inputs.train_rows, rows)
    function = nn.value_and_grad(
        inputs.model, lambda: cross_entropy_sum(inputs.forward, batch, cache.batch(batch))
    )
    loss, gradient = function()
    return loss, dict(tree_flatten(gradient))


def _largest_difference(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    assert one.keys() == other.keys()
    scale = max(float(mx.abs(array).max()) for array in one.values())
    return max(float(mx.abs(one[name] - other[name]).max()) for name in one) / scale


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_loss_is_the_reference(make_inputs: MakeInputs, num_layers: int) -> None:
    inputs = make_inputs(num_layers=num_layers)
    _wake_adapter(inputs)
    rows = (0, 3, 5, 7, 12)
    total, count = _reference(inputs, rows)
    loss, _ = _ours(inputs, rows)
    assert make_batch(inputs.train_rows, rows).trained_tokens == count
    assert float(loss) == pytest.approx(total, rel=1e-5)


def test_gradient_of_a_batch_is_the_sum_over_its_rows(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    _wake_adapter(inputs)
    _, together = _ours(inputs, (0, 1, 2, 3))
    alone = [_ours(inputs, (row,))[1] for row in range(4)]
    summed = alone[0]
    for gradient in alone[1:]:
        summed = tree_map(mx.add, summed, gradient)
    assert _largest_difference(together, summed) < 1e-5


def test_gradient_is_that_of_the_plain_forward(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    _wake_adapter(inputs)
    rows = (2, 4, 9)
    _, ours = _ours(inputs, rows)
    batch = make_batch(inputs.train_rows, rows)

    def plain() -> mx.array:
        logits = inputs.model(batch.ids).reshape(-1, 320)[batch.positions]
        total: mx.array = nn.losses.cross_entropy(logits, batch.targets, reduction="sum")
        return total

    _, reference = nn.value_and_grad(inputs.model, plain)()
    assert _largest_difference(dict(tree_flatten(reference)), ours) < 1e-5


def test_padding_is_never_a_target() -> None:
    """mlx-lm trains one padding token a padded row (its mask is one too wide); this does not."""
    rows = pack_rows(
        [
            (np.array([5, 6, 7, 8, 9], np.int32), np.array([0, 0, 0, 1, 1], np.uint8)),
            (np.arange(3, 13, dtype=np.int32), np.array([0] * 5 + [1] * 5, np.uint8)),
        ],
        [1, 2],
    )
    batch = make_batch(rows, (0, 1))
    assert batch.targets.tolist() == [8, 9, 8, 9, 10, 11, 12]
    assert batch.trained_tokens == 7

    class Recorder(nn.Module):
        """Uniform logits: then mlx-lm's loss counts its targets."""

        def __call__(self, ids: mx.array) -> mx.array:
            return mx.zeros((*ids.shape, 20))

    padded = mx.array([[5, 6, 7, 8, 9, 0, 0, 0, 0, 0]])
    _, counted = default_loss(Recorder(), padded, mx.array([[3, 5]]))
    assert int(counted) == 3, "mlx-lm no longer trains its padding: say so in the documentation"
    alone = make_batch(rows, (0,))
    assert alone.targets.tolist() == [8, 9]


def test_the_unpadded_width_is_the_longest_row() -> None:
    rows: TokenizedSplit = random_rows(6, seed=3)
    batch = make_batch(rows, tuple(range(6)))
    assert batch.ids.shape == (6, int(rows.lengths.max()) - 1)
    assert batch.tokens == int((rows.lengths - 1).sum())


def test_the_head_in_parts_is_the_head_at_once(
    make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs()
    _wake_adapter(inputs)
    rows = (0, 3, 5, 7, 12)
    at_once = _ours(inputs, rows)
    monkeypatch.setattr(losses, "LOGITS_PART_BYTES", 4 * 320 * 3)  # three positions at a time
    in_parts = _ours(inputs, rows)
    assert float(in_parts[0]) == pytest.approx(float(at_once[0]), rel=1e-6)
    assert _largest_difference(in_parts[1], at_once[1]) < 1e-5


def test_logits_of_all_positions_never_exist_together() -> None:
    """4,096 positions over 49,152 words would be 805 MB of logits, and mlx-lm's loss takes more."""
    head = mx.random.normal((49_152, 8)) * 0.1
    hidden = mx.random.normal((4_096, 8))
    targets = mx.random.randint(0, 49_152, (4_096,))

    class WideHead:
        head_is_frozen = True

        def head(self, hidden: mx.array) -> mx.array:
            return hidden @ head.T

    mx.eval(head, hidden, targets)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    function = mx.value_and_grad(lambda h: losses.frozen_head_loss(WideHead(), h, targets))  # type: ignore[arg-type]  # a head is all that is used
    loss, gradient = function(hidden)
    mx.eval(loss, gradient)
    copies = 6 if exp_is_slow() else 16  # of a part; with all positions it would be 48
    assert mx.get_peak_memory() - before < copies * LOGITS_PART_BYTES
    reference = nn.losses.cross_entropy(hidden[:64] @ head.T, targets[:64], reduction="sum")
    part = losses.frozen_head_loss(WideHead(), hidden[:64], targets[:64])  # type: ignore[arg-type]  # a head is all that is used
    assert float(part) == pytest.approx(float(reference), rel=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_loss_alone_has_the_bits_of_the_one_with_a_gradient(
    make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch, weighted: bool
) -> None:
    monkeypatch.setattr(losses, "LOGITS_PART_BYTES", 4 * 320 * 3)  # three positions at a time
    inputs = make_inputs()
    batch = make_batch(inputs.train_rows, (0, 3, 5, 7, 12))
    if weighted:
        batch = replace(batch, weights=mx.random.uniform(shape=batch.targets.shape))
    prefix = PrefixCache(inputs.forward, inputs.train_rows, 1 << 20).batch(batch)
    one, other = (
        cross_entropy_sum(inputs.forward, batch, prefix, with_gradient=needed).item()
        for needed in (True, False)
    )
    assert one == other


def test_a_trained_head_gets_its_gradient(make_inputs: MakeInputs) -> None:
    """A trained embedding moves all layers and the head: nothing may be taken as fixed."""
    inputs = make_inputs()
    inputs.model.model.embed_tokens.unfreeze()
    forward = choose_forward(inputs.model, 1, [inputs.train_rows.row(0)[0].tolist()])
    assert forward.frozen_layers == 0 and not forward.head_is_frozen
    batch = make_batch(inputs.train_rows, (0, 1))
    cache = PrefixCache(forward, inputs.train_rows, 1 << 20)

    def ours() -> mx.array:
        return cross_entropy_sum(forward, batch, cache.batch(batch))

    def plain() -> mx.array:
        logits = inputs.model(batch.ids).reshape(-1, 320)[batch.positions]
        total: mx.array = nn.losses.cross_entropy(logits, batch.targets, reduction="sum")
        return total

    one, other = (nn.value_and_grad(inputs.model, function)()[1] for function in (ours, plain))
    assert _largest_difference(dict(tree_flatten(one)), dict(tree_flatten(other))) < 1e-5


@pytest.mark.parametrize("num_layers", [2, 3])
def test_weighted_loss_and_gradient_are_those_of_the_plain_formula(
    make_inputs: MakeInputs, num_layers: int
) -> None:
    """Sum of weight x cross-entropy over sum of weights, by the whole model, one row at a time."""
    rows = random_rows(5, seed=3)
    weights = np.random.default_rng(0).uniform(0, 3, len(rows.ids)).astype(np.float32)
    rows = replace(rows, weights=weights)
    inputs = make_inputs(rows, num_layers=num_layers)
    batch = make_batch(rows, tuple(range(5)))

    def ours() -> mx.array:
        cache = PrefixCache(inputs.forward, rows, 1 << 20)
        return cross_entropy_sum(inputs.forward, batch, cache.batch(batch)) / batch.weight

    def plain() -> mx.array:
        total, weight = mx.zeros(()), 0.0
        for index in range(5):
            ids, trained = rows.row(index)
            logits = inputs.model(mx.array(ids[None, :-1].tolist()))[0]
            each = nn.losses.cross_entropy(logits, mx.array(ids[1:].tolist()))
            own = rows.row_weights(index)
            assert own is not None
            factors = (own * trained)[1:]
            total = total + (each * mx.array(factors.tolist())).sum()
            weight += float(factors.sum())
        return total / weight

    one, gradient = nn.value_and_grad(inputs.model, ours)()
    other, expected = nn.value_and_grad(inputs.model, plain)()
    assert one.item() == pytest.approx(other.item(), rel=1e-5)
    expected = dict(tree_flatten(expected))
    largest = max(float(mx.abs(array).max()) for array in expected.values())
    for name, array in tree_flatten(gradient):
        assert float(mx.abs(array - expected[name]).max()) < 1e-4 * largest, name
