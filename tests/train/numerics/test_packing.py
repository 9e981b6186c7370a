"""Rows behind each other are the rows one by one: states, losses, gradients."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models import llama
from mlx_lm.models.llama import TransformerBlock

from mlx_ft.train.numerics.forward import SplitForward, choose_forward
from mlx_ft.train.numerics.packing import ATTENTION, Packing, packed, packed_groups
from tests.support.models import write_tiny_model
from tests.support.split_models import (
    LAYERS,
    MORE_CONFIGS,
    WINDOW,
    adapted,
    gradient_difference,
    loaded,
    loss_and_gradient,
    model_of,
    rows_of,
)
from tests.support.trainings import random_rows


@given(
    st.lists(st.integers(4, 300), min_size=1, max_size=12), st.integers(0, 3), st.integers(1, 700)
)
def test_groups_hold_every_row_once_within_the_limit(
    lengths: list[int], shared: int, limit: int
) -> None:
    groups = packed_groups(np.array(lengths), range(len(lengths)), shared, limit)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        tokens = shared + sum(lengths[row] - shared for row in group)
        assert tokens <= limit or len(group) == 1


def test_a_batch_that_fits_is_one_group() -> None:
    assert packed_groups(np.array([300, 20, 500, 204]), (2, 0, 3, 1), 0, 1024) == [(0, 1, 2, 3)]
    assert packed_groups(np.array([300, 20, 500, 204]), (2, 0, 3, 1), 20, 964) == [(0, 1, 2, 3)]


@given(st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_spans_are_the_sequence_and_end_with_each_rows_own(shared: int, own: list[int]) -> None:
    packing = Packing(shared, tuple(own))
    tokens = [t for span in packing.spans for t in range(span.first, span.end)]
    assert tokens == list(range(packing.tokens)) and len(packing.spans) == len(own)
    for span, start, count in zip(packing.spans, packing.starts, own, strict=True):
        assert (span.end - count, span.end) == (start, start + count)
        assert span.position + span.end - span.first == shared + count


def test_a_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = loaded(write_tiny_model(tmp_path, layers=1))
    before = vars(llama)[ATTENTION], mx.fast.rope
    with pytest.raises(RuntimeError, match="on purpose"), packed(model, Packing(0, (1, 2))):
        assert (vars(llama)[ATTENTION], mx.fast.rope) != before
        raise RuntimeError("on purpose")
    assert (vars(llama)[ATTENTION], mx.fast.rope) == before


# Its attention is written out in its own module, so there is nothing to put another in for.
PADDED = {"gemma2"}


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", *MORE_CONFIGS])
def test_packed_rows_train_as_padded_ones(name: str, grad_checkpoint: bool, tmp_path: Path) -> None:
    """Loss and gradients of every adapter, windows shorter than the packed sequence included."""
    model = adapted(model_of(name, tmp_path, bits=4), 2)
    rows = random_rows(5, seed=5)
    assert rows.lengths.min() <= WINDOW < rows.lengths.max()
    longest = rows.row(int(rows.lengths.argmax()))[0].tolist()
    forward = choose_forward(model, 2, [longest], grad_checkpoint)
    assert isinstance(forward, SplitForward), forward.note
    assert forward.packs == (name not in PADDED), forward.note
    assert ("unpadded" if forward.packs else "rows padded") in forward.note
    if not forward.packs:
        return
    padded_loss, padded = loss_and_gradient(model, forward, rows)
    loss, gradient = loss_and_gradient(model, forward, rows, shared_tokens=0)
    assert loss == pytest.approx(padded_loss, rel=1e-5)
    assert gradient_difference(gradient, padded) <= 1e-4


class _Mixing(TransformerBlock):
    """A layer whose tokens see those before them in a way of its own."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        hidden: mx.array = super().__call__(x, mask, cache)
        return hidden + mx.cumsum(hidden, axis=1)


def test_a_model_that_mixes_tokens_elsewhere_is_padded(tmp_path: Path) -> None:
    model = loaded(write_tiny_model(tmp_path, layers=LAYERS))
    for layer in model.layers:
        layer.__class__ = _Mixing
    forward = choose_forward(model, 2, rows_of(7, 30))
    assert isinstance(forward, SplitForward), "as a whole row it is split"
    assert not forward.packs and "rows padded" in forward.note
