"""The last layer gives what it gives, and computes no more than trained tokens need."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.llama import MLP

from mlx_ft.train.numerics.forward import SplitForward, choose_forward
from mlx_ft.train.numerics.last_layer import MOST_CHOSEN, only_at, parts_of
from tests.support.split_models import (
    MORE_CONFIGS,
    adapted,
    gradient_difference,
    loss_and_gradient,
    model_of,
    rows_of,
)
from tests.support.trainings import random_rows


def split_of(model: nn.Module, grad_checkpoint: bool = False) -> SplitForward:
    forward = choose_forward(model, 2, rows_of(40), grad_checkpoint)
    assert isinstance(forward, SplitForward), forward.note
    return forward


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", *MORE_CONFIGS])
def test_loss_and_gradient_are_those_of_the_whole_layer(
    kind: str, packs: bool, grad_checkpoint: bool, tmp_path: Path
) -> None:
    model = adapted(model_of(kind, tmp_path), 2)
    forward = split_of(model, grad_checkpoint)
    assert forward.skips and "most of the last layer" in forward.note
    forward.packs = forward.packs and packs
    rows = random_rows(4, seed=5)
    shared = 0 if forward.packs else None
    loss, gradient = loss_and_gradient(model, forward, rows, shared)
    forward.skips = False
    whole_loss, whole_gradient = loss_and_gradient(model, forward, rows, shared)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert gradient_difference(gradient, whole_gradient) <= 1e-5


def test_the_feed_forward_part_sees_wanted_positions_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(model_of("llama", tmp_path), 2)
    forward = split_of(model)
    seen: list[int] = []
    original = MLP.__call__

    def count(self: nn.Module, hidden: mx.array) -> mx.array:
        seen.append(hidden.size // hidden.shape[-1])
        result: mx.array = original(self, hidden)
        return result

    monkeypatch.setattr(MLP, "__call__", count)
    ids = mx.array(rows_of(20, 20))
    prefix = forward.prefix(ids)
    seen.clear()
    forward.top(ids, prefix, None, mx.array([3, 19, 30]))
    assert seen == [40, 3], "the first trained layer is computed everywhere, the last one is not"
    seen.clear()
    forward.top(ids, prefix, None, mx.arange(int(40 * MOST_CHOSEN) + 1))
    assert seen == [40, 40], "few positions to leave out are not worth taking apart"


def test_the_layer_is_as_it_was_afterwards(tmp_path: Path) -> None:
    layer = adapted(model_of("qwen3", tmp_path), 2).layers[-1]
    before = dict(layer.named_modules())
    with pytest.raises(ZeroDivisionError), only_at(layer, mx.array([0])):
        assert layer.mlp is not before["mlp"]
        assert dict(layer.named_modules()).keys() == before.keys()
        raise ZeroDivisionError
    after = dict(layer.named_modules())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in after)


class _Mixing(MLP):
    """A feed-forward part that looks at the position before, unlike anything of its name."""

    def __call__(self, hidden: mx.array) -> mx.array:
        result: mx.array = super().__call__(hidden + mx.roll(hidden, 1, 1))
        return result


def test_a_part_that_mixes_positions_is_found_out(tmp_path: Path) -> None:
    model = adapted(model_of("llama", tmp_path), 2)
    model.layers[-1].mlp.__class__ = _Mixing
    forward = split_of(model)
    assert not forward.skips and "last layer" not in forward.note


def test_a_layer_of_other_parts_is_left_alone() -> None:
    assert parts_of(nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))) == []
