"""Rows packed by places have the loss and gradient of rows packed span by span, and few sizes."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_ft.data.tokens import TokenizedSplit
from mlx_ft.engine.device import AS_GPU
from mlx_ft.engine.load import scalar
from mlx_ft.train.accumulation import micro_batches
from mlx_ft.train.numerics.batch import Batch
from mlx_ft.train.numerics.buckets import SMALLEST, bucket
from mlx_ft.train.numerics.forward import SplitForward, choose_forward
from mlx_ft.train.numerics.losses import cross_entropy_sum
from mlx_ft.train.numerics.packed_places import PackedPlaces, places_of
from mlx_ft.train.numerics.packing import Packing
from mlx_ft.train.numerics.prefix_cache import PrefixCache
from tests.support.gpu import GPU_CONFIGS
from tests.support.models import write_stored_model
from tests.support.slow import fast_first
from tests.support.split_models import adapted
from tests.support.trainings import random_rows

Found = list[tuple[float, dict[str, mx.array]]]


@given(st.integers(1, 100_000), st.sampled_from([8, 16]))
def test_a_bucket_is_the_next_of_few_sizes(size: int, steps: int) -> None:
    found = bucket(size, steps)
    assert size <= found and found % SMALLEST == 0 and bucket(found, steps) == found
    assert found - size < max(SMALLEST, 2 * size / steps)


@given(st.integers(0, 40), st.lists(st.integers(1, 70), min_size=2, max_size=6))
def test_every_token_has_its_place_and_position(shared: int, own: list[int]) -> None:
    packing = Packing(shared, tuple(own))
    places = PackedPlaces.of(packing)
    apart, back, positions = (np.array(a) for a in (places.own, places.back, places.positions))
    real = packing.tokens - shared
    assert places.tokens > packing.tokens and places.tokens >= shared + apart.shape[1]
    assert (apart.reshape(-1)[back[:real]] == np.arange(real)).all()
    # Padding goes from a padded place to a padded token, so that its gradient meets no real one.
    assert (back[real:] == apart.shape[1] - 1).all() and apart[0, -1] == places.tokens - shared - 1
    for row, (start, count) in enumerate(zip(packing.starts, own, strict=True)):
        assert (positions[start : start + count] == shared + np.arange(count)).all()
        assert (apart[row, :count] + shared == start + np.arange(count)).all()
        assert (apart[row, count:] == places.tokens - shared - 1).all()


@pytest.fixture
def compiled() -> Iterator[None]:
    """A GPU compiles; a model that was loaded for this CPU has ended that."""
    mx.enable_compile()
    yield
    mx.disable_compile()


def gradients(
    forward: SplitForward, model: nn.Module, rows: TokenizedSplit, limit: int, shared: int | None
) -> Found:
    """Return the loss and gradient of each micro-batch."""

    def loss_of(batch: Batch, prefix: mx.array) -> mx.array:
        return cross_entropy_sum(forward, batch, prefix)

    function = nn.value_and_grad(model, loss_of)
    cache = PrefixCache(forward, rows, 1 << 24)
    found = []
    for batch in micro_batches(rows, range(len(rows)), shared, limit):
        loss, gradient = function(batch, cache.batch(batch))
        found.append((scalar(loss), dict(tree_flatten(gradient))))
    return found


@pytest.mark.parametrize("shared", fast_first([6, 0, None]))
@pytest.mark.parametrize("kind", fast_first(GPU_CONFIGS))
@pytest.mark.usefixtures("compiled")
def test_a_gpus_batches_have_the_same_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, shared: int | None
) -> None:
    """In float32, where rounding hides nothing; window layers see less than the sequence."""
    config = GPU_CONFIGS[kind] | {"num_hidden_layers": 3}
    model = adapted(write_stored_model(tmp_path / "base", config, mx.float32), 2)
    rows = random_rows(9, seed=3, start=shared or 0)
    longest = max((rows.row(index)[0] for index in range(len(rows))), key=len)
    for limit in (10**6, 40):
        found = {}
        for as_gpu in ("0", "1"):
            monkeypatch.setenv(AS_GPU, as_gpu)
            forward = choose_forward(model, 2, [longest.tolist()])
            assert isinstance(forward, SplitForward) and forward.packs, forward.note
            found[as_gpu] = gradients(forward, model, rows, limit, shared)
        for (loss, one), (other_loss, other) in zip(found["0"], found["1"], strict=True):
            assert loss == pytest.approx(other_loss, rel=1e-6)
            largest = max(scalar(mx.abs(array).max()) for array in one.values())
            for name, array in one.items():
                assert scalar(mx.abs(array - other[name]).max()) <= 1e-4 * largest, name


def test_a_cpu_and_a_single_row_need_no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    packing = Packing(3, (4, 5))
    assert places_of(packing) is None
    monkeypatch.setenv(AS_GPU, "1")
    assert places_of(Packing(3, (4,))) is None and places_of(None) is None
    assert isinstance(places_of(packing), PackedPlaces)
