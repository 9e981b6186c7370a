"""What is computed twice has the gradient of what is kept, in less memory."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.lora import LoRALinear

from mlx_ft.engine.adapters import make_trainable_layers
from mlx_ft.recipe.schema import LoraParameters, TrainRecipe
from mlx_ft.train.numerics.forward import SplitForward, choose_forward
from mlx_ft.train.numerics.recompute import recompute_cheap_inputs
from tests.support.models import TINY_CONFIGS, random_model
from tests.support.split_models import (
    MORE_CONFIGS,
    adapted,
    gradient_difference,
    loss_and_gradient,
    model_of,
    rows_of,
)
from tests.support.trainings import random_rows

LAYERS, TOKENS = 8, 128


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", *MORE_CONFIGS])
def test_loss_and_gradient_are_those_of_kept_inputs(kind: str, packs: bool, tmp_path: Path) -> None:
    model = adapted(model_of(kind, tmp_path, bits=4), 2)
    rows = random_rows(5, seed=5)
    results = []
    for again in (False, True):
        forward = choose_forward(model, 2, rows_of(40), recompute_inputs=again)
        assert isinstance(forward, SplitForward), forward.note
        assert ("norms and gates computed twice" in forward.note) == again
        shared = 0 if forward.packs and packs else None
        results.append(loss_and_gradient(model, forward, rows, shared))
    (kept_loss, kept), (loss, gradient) = results
    assert loss == kept_loss, "what goes forward is the same"
    assert gradient_difference(gradient, kept) <= 1e-5


def peak_of_a_step(model: nn.Module, recompute_inputs: bool, grad_checkpoint: bool = False) -> int:
    """Return the bytes at the peak of one gradient, beyond those of the model."""
    forward = SplitForward(model, 0, grad_checkpoint, recompute_inputs=recompute_inputs)
    ids = mx.array(rows_of(TOKENS))
    prefix = mx.zeros((*ids.shape, 0))
    function = nn.value_and_grad(model, lambda: forward.top(ids, prefix).sum())
    mx.eval(model.parameters())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(function())
    return int(mx.get_peak_memory()) - before


def test_less_is_kept() -> None:
    """Of a token's 14,800 numbers a layer, norms, sigmoids and gates are 5,600."""
    mx.disable_compile()  # as on a CPU, where gates keep more
    wide = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 128}
    model = random_model(TINY_CONFIGS["llama"] | wide | heads)
    model.freeze()
    lora = {"rank": 8, "scale": 8.0, "dropout": 0.0}
    make_trainable_layers(model, {"num_layers": LAYERS, "lora_parameters": lora})
    model.train()
    kept, again = (peak_of_a_step(model, recompute_inputs) for recompute_inputs in (False, True))
    assert again < 0.8 * kept
    assert peak_of_a_step(model, False, grad_checkpoint=True) < 0.5 * kept


def test_everything_is_as_it_was_afterwards(tmp_path: Path) -> None:
    model = adapted(model_of("llama", tmp_path), 2)

    def in_place() -> tuple[object, ...]:
        return mx.fast.rms_norm, LoRALinear.__call__, vars(llama)["swiglu"]

    before, names = in_place(), [name for name, _ in tree_flatten(model.parameters())]
    with pytest.raises(ZeroDivisionError), recompute_cheap_inputs(model):
        assert all(one is not other for one, other in zip(before, in_place(), strict=True))
        raise ZeroDivisionError
    assert in_place() == before
    assert [name for name, _ in tree_flatten(model.parameters())] == names


def test_dropout_draws_anew_so_its_inputs_are_kept() -> None:
    assert TrainRecipe(low_memory=True).computes_inputs_again
    for train in (
        TrainRecipe(),
        TrainRecipe(low_memory=True, lora_parameters=LoraParameters(dropout=0.1)),
        TrainRecipe(low_memory=True, grad_checkpoint=True),
        TrainRecipe(low_memory=True, fine_tune_type="dora"),
    ):
        assert not train.computes_inputs_again
