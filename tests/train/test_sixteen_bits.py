"""Models whose weights stay as they are stored, as on Metal or with low memory, train like those in
float32.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ft.engine.load import load_weights
from mlx_ft.recipe.schema import TrainRecipe
from mlx_ft.train.adapters import ADAPTER_FILE
from mlx_ft.train.handoff import TrainRequest
from mlx_ft.train.numerics.forward import PlainForward
from mlx_ft.train.numerics.losses import frozen_head_loss
from mlx_ft.train.sanity_check import Prompt
from mlx_ft.train.session import train_one
from tests.support.models import write_stored
from tests.support.slow import fast_first, fast_rows_first
from tests.support.training_processes import request_in
from tests.support.trainings import quiet

SIXTEEN_BITS = {"float16": mx.float16, "bfloat16": mx.bfloat16}


def request_of(place: Path, base: Path, **train: Any) -> TrainRequest:
    request = request_in(place, base, iters=12, steps_per_eval=6)
    recipe = TrainRecipe.model_validate(request.recipe.train.model_dump(exclude={"epochs"}) | train)
    return replace(
        request,
        recipe=request.recipe.model_copy(update={"train": recipe}),
        sanity_prompts=[Prompt([{"role": "user", "content": "hello"}])],
        sanity_required=False,
    )


def trained(place: Path, base: Path, **train: Any) -> dict[str, Any]:
    return train_one(request_of(place, base, **train), quiet())


def adapter_in(place: Path) -> dict[str, mx.array]:
    found = mx.load(str(place / "train.tmp" / "adapter" / ADAPTER_FILE))
    assert isinstance(found, dict)
    return found


def likeness(one: Path, other: Path) -> float:
    """Return the correlation of what two runs have learned: the matrices that began at zero."""
    learned = [
        np.concatenate(
            [np.array(a).ravel() for n, a in sorted(adapter_in(place).items()) if ".lora_b" in n]
        )
        for place in (one, other)
    ]
    return float(np.corrcoef(learned[0], learned[1])[0, 1])


@pytest.mark.parametrize("bits", fast_first([4, None]))
@pytest.mark.parametrize(
    ("kind", "dtype"),
    fast_rows_first(
        [
            *((kind, dtype) for kind in ("llama", "qwen3") for dtype in SIXTEEN_BITS),
            ("gemma3_text", "bfloat16"),  # what float16 cannot hold of a real one
        ],
        len(SIXTEEN_BITS),
    ),
)
def test_weights_as_they_are_stored_train_like_expanded_ones(
    tmp_path: Path, kind: str, dtype: str, bits: int | None
) -> None:
    layers = 7 if kind == "gemma3_text" else 3
    base = write_stored(tmp_path / "base", kind, SIXTEEN_BITS[dtype], bits, layers)
    stored = trained(tmp_path / "stored", base, low_memory=True)
    expanded = trained(tmp_path / "expanded", base)
    assert "float32" in expanded["compute"] and "float32" not in stored["compute"]
    for name in ("first_validation_loss", "final_validation_loss"):
        # A bfloat16 has 8 significant bits, and each layer rounds once more.
        assert stored[name] == pytest.approx(expanded[name], rel=layers**0.5 / 256), name
    assert likeness(tmp_path / "stored", tmp_path / "expanded") > 0.8


@pytest.mark.parametrize(
    "changes",
    fast_first(
        [
            {"grad_checkpoint": True},
            {"lora_parameters": {"rank": 4, "alpha": 8.0}},
            {"fine_tune_type": "dora"},
            {"lora_parameters": {"rank": 4, "alpha": 8.0, "keys": ["self_attn.q_proj", "lm_head"]}},
            {"micro_batch_tokens": 40, "grad_accumulation_steps": 3},
        ]
    ),
    ids=str,
)
def test_and_so_they_do_with_other_settings(tmp_path: Path, changes: dict[str, Any]) -> None:
    base = write_stored(tmp_path / "base", "qwen3", mx.bfloat16, 4)
    stored = trained(tmp_path / "stored", base, low_memory=True, **changes)
    expanded = trained(tmp_path / "expanded", base, **changes)
    assert stored["final_validation_loss"] == pytest.approx(
        expanded["final_validation_loss"], rel=1 / 256
    )
    assert likeness(tmp_path / "stored", tmp_path / "expanded") > 0.8


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_the_loss_of_a_frozen_head_has_the_gradient_of_the_plain_formula(
    tmp_path: Path, dtype: str
) -> None:
    base = write_stored(tmp_path / "base", "llama", SIXTEEN_BITS[dtype])
    model, _, _ = load_weights(base, True)
    forward = PlainForward(model, "")
    mx.random.seed(0)
    hidden = mx.random.normal((9, 64)).astype(SIXTEEN_BITS[dtype])
    targets = mx.arange(5, 14)

    def plain(hidden: mx.array) -> mx.array:
        logits = forward.head(hidden).astype(mx.float32)
        total: mx.array = nn.losses.cross_entropy(logits, targets, reduction="sum")
        return total

    def ours(hidden: mx.array) -> mx.array:
        return frozen_head_loss(forward, hidden, targets)

    (loss, gradient), (expected_loss, expected) = (
        mx.value_and_grad(function)(hidden) for function in (ours, plain)
    )
    assert gradient.dtype == expected.dtype == SIXTEEN_BITS[dtype]
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    one, other = (np.array(each.astype(mx.float32)) for each in (gradient, expected))
    assert np.abs(one - other).max() <= np.abs(other).max() / 128


@pytest.mark.slow
@pytest.mark.parametrize("dtype", fast_first(SIXTEEN_BITS))
def test_all_weights_of_a_layer_are_trained_in_float32(tmp_path: Path, dtype: str) -> None:
    """Adam's squares underflow in float16, and a bfloat16 rounds small updates away."""
    base = write_stored(tmp_path / "base", "llama", SIXTEEN_BITS[dtype])
    rate = {"fine_tune_type": "full", "learning_rate": 1e-5}
    stored = trained(tmp_path / "stored", base, low_memory=True, **rate)
    expanded = trained(tmp_path / "expanded", base, **rate)
    one, other = adapter_in(tmp_path / "stored"), adapter_in(tmp_path / "expanded")
    before, _, _ = load_weights(base)
    start = dict(tree_flatten(before.parameters()))
    assert one.keys() == other.keys()
    assert all(array.dtype == mx.float32 for array in one.values())
    moved = [
        np.array((arrays[name] - start[name]).flatten())
        for arrays in (one, other)
        for name in [next(name for name in one if name.endswith("down_proj.weight"))]
    ]
    assert np.corrcoef(moved[0], moved[1])[0, 1] > 0.9, "it goes where the one in float32 goes"
    assert stored["final_validation_loss"] == pytest.approx(
        expanded["final_validation_loss"], rel=1 / 128
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", fast_first(SIXTEEN_BITS))
def test_an_adapter_that_was_stored_in_16_bits_goes_on_in_float32(
    tmp_path: Path, dtype: str
) -> None:
    base = write_stored(tmp_path / "base", "llama", mx.float16)
    trained(tmp_path / "first", base)
    first = adapter_in(tmp_path / "first")
    narrow = {name: array.astype(SIXTEEN_BITS[dtype]) for name, array in first.items()}
    wide = {name: array.astype(mx.float32) for name, array in narrow.items()}
    for name, arrays in (("narrow", narrow), ("wide", wide)):
        mx.save_safetensors(str(tmp_path / f"{name}.safetensors"), arrays)
        trained(tmp_path / name, base, resume_adapter_file=str(tmp_path / f"{name}.safetensors"))
    one, other = adapter_in(tmp_path / "narrow"), adapter_in(tmp_path / "wide")
    for name, array in one.items():
        assert array.dtype == mx.float32
        assert mx.array_equal(array, other[name]), name
