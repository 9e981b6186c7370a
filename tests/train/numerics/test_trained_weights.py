"""An adapter as one vector trains as its matrices one by one, with the same names on the disk."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_ft.engine.device import AS_GPU
from mlx_ft.engine.load import scalar
from mlx_ft.train import accumulation
from mlx_ft.train.accumulation import (
    COMPILED_SIZES,
    OPTIMIZERS,
    GradientWindow,
    StepForm,
    micro_batches,
)
from mlx_ft.train.contract import TrainingInputs
from mlx_ft.train.numerics.batch import Batch
from mlx_ft.train.numerics.flat_adapter import FlatAdapter
from mlx_ft.train.numerics.losses import cross_entropy_sum
from mlx_ft.train.numerics.prefix_cache import PrefixCache
from mlx_ft.train.numerics.trained_weights import FlatWeights, SeparateWeights, trained_weights
from tests.support.slow import fast_first
from tests.support.trainings import adapter_of, assert_same_bits, random_rows
from tests.train.conftest import MakeInputs

ROWS = random_rows(9, seed=3)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(AS_GPU, "1")
    mx.enable_compile()
    yield
    mx.disable_compile()


def window_of(
    inputs: TrainingInputs, optimizer: optimizers.Optimizer, form: StepForm
) -> GradientWindow:
    def loss(batch: Batch, prefix: mx.array) -> mx.array:
        return cross_entropy_sum(inputs.forward, batch, prefix)

    return GradientWindow(inputs.model, loss, optimizer, 0.5, form)


def batches_of(inputs: TrainingInputs, rows: range) -> Iterator[tuple[Batch, mx.array]]:
    cache = PrefixCache(inputs.forward, inputs.train_rows, 1 << 20)
    for batch in micro_batches(inputs.train_rows, rows, 0, 60):
        yield batch, cache.batch(batch)


def updated(inputs: TrainingInputs, optimizer: optimizers.Optimizer, form: StepForm) -> list[float]:
    """Train three updates on all rows; return their losses."""
    window = window_of(inputs, optimizer, form)
    losses = []
    for _ in range(3):
        for batch, prefix in batches_of(inputs, range(len(ROWS))):
            window.add(batch, prefix)
        losses.append(window.update(1e-2).loss)
    return losses


def test_a_vector_and_its_views_are_the_same_numbers(make_inputs: MakeInputs) -> None:
    model = make_inputs(ROWS).model
    adapter = FlatAdapter(model, shares_inputs=True)
    named = dict(tree_flatten(model.trainable_parameters()))
    views = adapter.unpack(adapter.pack(named))
    assert views.keys() == named.keys()
    assert all(mx.array_equal(views[name], named[name]).item() for name in named)


def test_weights_that_others_have_put_there_are_read(make_inputs: MakeInputs) -> None:
    inputs = make_inputs(ROWS)
    weights = trained_weights(inputs.model, optimizers.Adam(1.0), mx.float32, True)
    assert isinstance(weights, FlatWeights)
    before = weights.read()
    assert weights.read()["adapter"] is before["adapter"]
    inputs.model.load_weights(
        [(n, a + 1) for n, a in tree_flatten(inputs.model.trainable_parameters())], strict=False
    )
    difference = weights.read()["adapter"] - before["adapter"]
    assert scalar(mx.abs(difference - 1).max()) < 1e-6


FORMS = {
    "flat": StepForm(mx.float32),
    "joined": StepForm(mx.float32, shares_inputs=True),
    "compiled": StepForm(mx.float32, shares_inputs=True, compiled=True),
}


@pytest.mark.parametrize("kind", fast_first(["adamw", "adam", "sgd", "lion"]))
@pytest.mark.parametrize("form", FORMS)
def test_every_form_learns_the_same_under_the_same_names(
    make_inputs: MakeInputs, form: str, kind: str
) -> None:
    found = []
    for number, each in enumerate((StepForm(), FORMS[form])):
        inputs = make_inputs(ROWS, folder=str(number))
        optimizer = OPTIMIZERS[kind](learning_rate=1e-2)
        losses = updated(inputs, optimizer, each)
        state = {name: np.array(array) for name, array in tree_flatten(optimizer.state)}
        found.append((losses, adapter_of(inputs), state))
    (losses, one, state), (other_losses, other, other_state) = found
    assert losses == pytest.approx(other_losses, rel=1e-5) and losses[-1] < losses[0]
    assert state.keys() == other_state.keys()
    # The sign of a gradient that is nearly nothing decides in Lion, and nearly so in Adam.
    learned = [np.concatenate([a.ravel() for _, a in sorted(x.items())]) for x in (one, other)]
    assert np.corrcoef(learned[0], learned[1])[0, 1] > 0.9999
    if kind == "sgd":
        assert all(np.abs(one[name] - other[name]).max() < 1e-5 for name in one)


def test_a_resumed_optimizer_goes_on_with_the_same_bits(make_inputs: MakeInputs) -> None:
    """State that comes from a file is laid out as the state that never left."""
    adapters = []
    for resumed in (False, True):
        inputs = make_inputs(ROWS, folder=str(resumed))
        optimizer = optimizers.Adam(1e-2)
        window = window_of(inputs, optimizer, FORMS["compiled"])
        for index in range(4):
            for batch, prefix in batches_of(inputs, range(4)):
                window.add(batch, prefix)
            window.update(1e-2)
            if resumed and index == 1:
                copies = [(n, mx.array(np.array(a))) for n, a in tree_flatten(optimizer.state)]
                weights = [(n, mx.array(a)) for n, a in sorted(adapter_of(inputs).items())]
                inputs = make_inputs(ROWS, folder="again")
                inputs.model.load_weights(weights, strict=False)
                optimizer = optimizers.Adam(1e-2)
                optimizer.init(inputs.model.trainable_parameters())
                optimizer.state = tree_unflatten(copies)
                window = window_of(inputs, optimizer, FORMS["compiled"])
        adapters.append(adapter_of(inputs))
    assert_same_bits(*adapters)


@pytest.mark.parametrize(
    "changes",
    [
        {"fine_tune_type": "full"},
        {"fine_tune_type": "dora"},
        {"optimizer": "muon"},
        {"optimizer": "adafactor"},
    ],
    ids=str,
)
def test_what_is_not_a_plain_adapter_stays_as_it_is(
    make_inputs: MakeInputs, changes: dict[str, Any]
) -> None:
    inputs = make_inputs(ROWS, **changes)
    optimizer = accumulation.build_optimizer(inputs.recipe)
    found = trained_weights(inputs.model, optimizer, mx.bfloat16, True)
    assert isinstance(found, SeparateWeights)


def test_batches_of_the_same_sizes_share_one_graph_and_few_are_kept(
    make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert COMPILED_SIZES >= 8
    monkeypatch.setattr(accumulation, "COMPILED_SIZES", 3)
    inputs = make_inputs(random_rows(40, seed=5, longest=200))
    window = window_of(inputs, optimizers.SGD(1.0), FORMS["compiled"])
    cache = PrefixCache(inputs.forward, inputs.train_rows, 1 << 24)
    lengths = inputs.train_rows.lengths
    for rows in ((0,), (1, 2), (3,), (4, 5, 6)):
        (batch,) = micro_batches(inputs.train_rows, rows, 0, 10**6)
        loss, _ = window.gradient(batch, cache.batch(batch))
        assert np.isfinite(scalar(loss))
        assert len(window._functions) <= 3
    order = np.argsort(lengths)
    sizes = set()
    for row in order[-8:]:
        (batch,) = micro_batches(inputs.train_rows, (int(row),), 0, 10**6)
        arrays = batch.arrays
        sizes.add(tuple((name, array.shape) for name, array in arrays.items()))
    assert len(sizes) < len(set(lengths[order[-8:]].tolist())), "lengths, but not sizes, differ"


def test_a_compiled_step_draws_its_dropout_from_the_seed_of_the_call(
    make_inputs: MakeInputs,
) -> None:
    inputs = make_inputs(ROWS, dropout=0.5)
    # Fresh second matrices are zero, and hide what is dropped.
    changed = [(n, a + 0.1) for n, a in tree_flatten(inputs.model.trainable_parameters())]
    inputs.model.load_weights(changed, strict=False)
    inputs.model.train()
    form = StepForm.of(inputs.recipe, inputs.forward)
    assert form.draws and form.compiled and not form.shares_inputs
    window = window_of(inputs, optimizers.SGD(1.0), form)
    ((batch, prefix),) = batches_of(inputs, range(2))
    losses = []
    for seed in (1, 2, 1):
        mx.random.seed(seed)
        losses.append(scalar(window.gradient(batch, prefix)[0]))
    assert losses[0] == losses[2] != losses[1]


def test_layers_that_are_computed_twice_and_draw_are_not_compiled(make_inputs: MakeInputs) -> None:
    inputs = make_inputs(ROWS, dropout=0.5, grad_checkpoint=True)
    assert not StepForm.of(inputs.recipe, inputs.forward).compiled
