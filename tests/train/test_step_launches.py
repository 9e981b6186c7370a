"""A step on a GPU begins few kernels: at most 0.6 of mlx-lm's compiled step, the update a dozen.

Counted in graphs that are not computed, so that widths do not matter and none is real but the
vocabulary's.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_ft.data.tokens import pack_rows
from mlx_ft.engine.device import AS_GPU
from mlx_ft.recipe.schema import LoraParameters, TrainRecipe
from mlx_ft.train.accumulation import GradientWindow, StepForm, build_optimizer
from mlx_ft.train.adapters import put_adapter
from mlx_ft.train.numerics.batch import Batch, make_batch
from mlx_ft.train.numerics.forward import SplitForward
from mlx_ft.train.numerics.losses import cross_entropy_sum
from tests.support.launches import COPIES, fast_operations, launches

ADAPTED = 12
LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}
# Layers and words of SmolLM2-135M and of Llama 3.2 3B.
SHAPES = {"135M": (30, 49152, None), "3B": (28, 128256, 4)}
EQUAL, RAGGED = (128, 128, 128, 128), (40, 80, 120, 128)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(AS_GPU, "1")
    mx.enable_compile()
    yield
    mx.disable_compile()


def model_of(layers: int, words: int, bits: int | None) -> nn.Module:
    """Return a Llama of few numbers, in bfloat16 or quantized, all zero."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    rest = {"vocab_size": words, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    model = Model(ModelArgs.from_dict({"model_type": "llama", **sizes, **heads, **rest}))
    model.update(tree_map(lambda a: mx.zeros(a.shape, mx.bfloat16), model.parameters()))
    if bits is not None:
        nn.quantize(model, 64, bits)
    mx.eval(model.parameters())
    model.freeze()
    return model


def graph_of(*trees: Any) -> list[mx.array]:
    return [array for _, array in tree_flatten(list(trees)) if isinstance(array, mx.array)]


def theirs(model: nn.Module, lengths: Sequence[int]) -> Counter[str]:
    """Return the launches of the step that mlx_lm.lora compiles."""
    linear_to_lora_layers(model, ADAPTED, LORA)
    model.train()
    optimizer = optimizers.Adam(1e-4)
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state)
    loss_and_gradient = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: tuple[mx.array, mx.array]) -> Any:
        (loss, tokens), gradient = loss_and_gradient(model, *batch)
        optimizer.update(model, gradient)
        return loss, tokens

    ids = mx.zeros((len(lengths), max(lengths) + 1), mx.int32)
    ends = mx.array([[length // 2, length] for length in lengths])
    mx.eval(ids, ends)
    return launches(*graph_of(step((ids, ends)), model.trainable_parameters(), optimizer.state))


def prepared(model: nn.Module, lengths: Sequence[int]) -> tuple[GradientWindow, Batch, mx.array]:
    lora = LoraParameters(rank=8, scale=20.0)
    train = TrainRecipe(num_layers=ADAPTED, lora_parameters=lora, iters=1)
    config = {"fine_tune_type": "lora", "num_layers": ADAPTED, "lora_parameters": LORA}
    put_adapter(model, train, config)
    model.train()
    forward = SplitForward(model, len(model.model.layers) - ADAPTED)
    forward.packs = forward.skips = True
    forward.dtype = mx.bfloat16
    rows = []
    for length in lengths:
        trained = np.zeros(length + 1, np.uint8)
        trained[length // 2 :] = 1
        rows.append((np.arange(3, length + 4, dtype=np.int32), trained))
    batch = make_batch(pack_rows(rows, list(range(len(rows)))), tuple(range(len(rows))), 0)
    prefix = mx.zeros((*batch.ids.shape, 64), mx.bfloat16)
    optimizer = build_optimizer(train)
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state, batch.arrays, prefix)
    window = GradientWindow(
        model,
        lambda batch, prefix: cross_entropy_sum(forward, batch, prefix),
        optimizer,
        1.0,
        StepForm.of(train, forward),
    )
    return window, batch, prefix


def ours(model: nn.Module, lengths: Sequence[int]) -> tuple[Counter[str], Counter[str]]:
    """Return the launches of a gradient, and of an update."""
    window, batch, prefix = prepared(model, lengths)
    mx.eval(window._weights.read())  # laid out once, not at each step
    loss, gradient = window.gradient(batch, prefix)
    of_gradient = launches(*graph_of(loss, gradient))
    none = tree_map(mx.zeros_like, gradient)
    weights, optimizer = window._weights, window._optimizer
    before = none, weights.read(), weights.read_state(optimizer)
    mx.eval(before)
    scalars = (mx.array(1.0), mx.array(1.0), mx.array(1e-4))
    return of_gradient, launches(*graph_of(window._step(*before, *scalars)))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_begins_at_most_six_tenths_of_mlx_lms(shape: str) -> None:
    """Of the primitives that compute; 0.72 with the copies of concatenations."""
    with fast_operations():
        plain = theirs(model_of(*SHAPES[shape]), EQUAL)
        gradient, update = ours(model_of(*SHAPES[shape]), EQUAL)
        ragged, _ = ours(model_of(*SHAPES[shape]), RAGGED)
    step = gradient + update
    print(shape, [(primitives(each), each.total()) for each in (plain, step, ragged + update)])
    assert primitives(step) <= 0.6 * primitives(plain)
    assert step.total() <= 0.72 * plain.total()
    # Rows of other lengths are gathered, and scattered, for attention: four times each a layer.
    assert 0 < (ragged - gradient).total() <= 8 * ADAPTED + 20
    assert update.total() <= 16


def primitives(found: Counter[str]) -> int:
    return found.total() - found[COPIES]
