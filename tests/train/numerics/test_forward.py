"""The fast forward is the plain one, proved on real rows - or it is not used, and that is said."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.llama import LlamaModel
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_ft.data.tokens import write_split
from mlx_ft.engine.adapters import make_trainable_layers
from mlx_ft.engine.partial_model import EQUAL_TOLERANCE, relative_difference
from mlx_ft.recipe.schema import DataRecipe, LoraParameters, Recipe, TrainRecipe
from mlx_ft.train import setup
from mlx_ft.train.adapters import adapter_config, put_adapter
from mlx_ft.train.handoff import TrainRequest
from mlx_ft.train.numerics.forward import (
    PROOF_LOGIT_TOKENS,
    Forward,
    PlainForward,
    Proof,
    RowStates,
    SplitForward,
    choose_forward,
    prove_equal,
    states_of,
)
from tests.support.models import random_model, write_tiny_model
from tests.support.split_models import (
    LAYERS,
    MORE_CONFIGS,
    adapted,
    gradient_difference,
    loaded,
    loss_and_gradient,
    make_other,
    rows_of,
)
from tests.support.trainings import random_rows, train_here
from tests.train.conftest import MakeInputs

ROWS = rows_of(7, 30, 100)


assert len(ROWS[-1]) > PROOF_LOGIT_TOKENS


def states_of_rows(split: Forward) -> list[RowStates]:
    return [states_of(split, row) for row in ROWS]


@pytest.fixture(scope="module", params=list(MORE_CONFIGS))
def other_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_other(request.param, tmp_path_factory.mktemp(request.param))


def whole_logits(forward: Forward, row: Sequence[int]) -> np.ndarray:
    ids = mx.array([list(row)])
    return np.array(forward.head(forward.top(ids, forward.prefix(ids))[0]).astype(mx.float32))


@pytest.mark.parametrize("frozen", range(LAYERS + 1))
def test_the_split_is_the_plain_forward_at_every_height(model_folder: Path, frozen: int) -> None:
    model = loaded(model_folder)
    split = SplitForward(model, frozen)
    assert prove_equal(model, split, states_of_rows(split)).relative_difference <= 1e-5
    for row in ROWS:
        plain = np.array(model(mx.array([row]))[0])
        assert np.allclose(whole_logits(split, row), plain, rtol=1e-5, atol=1e-5)
    hidden = split.prefix(mx.array([ROWS[0]])).shape[-1]
    assert hidden == (64 if frozen else 0)


@pytest.mark.parametrize("adapted_layers", [1, 2, LAYERS])
def test_known_models_get_the_split_and_it_says_so(model_folder: Path, adapted_layers: int) -> None:
    model = adapted(model_folder, adapted_layers)
    names = [name for name, _ in tree_flatten(model.parameters())]
    forward = choose_forward(model, adapted_layers, ROWS)
    assert isinstance(forward, SplitForward)
    assert forward.frozen_layers == LAYERS - adapted_layers
    assert forward.note.startswith(f"{LAYERS - adapted_layers} of {LAYERS} layers frozen")
    assert [name for name, _ in tree_flatten(model.parameters())] == names, "the model is as it was"
    assert len(model.layers) == LAYERS


@pytest.mark.parametrize("adapted_layers", [1, 2, LAYERS])
def test_loss_and_gradient_are_those_of_the_plain_forward(
    model_folder: Path, adapted_layers: int
) -> None:
    """On a padded batch, with every row's prefix computed alone."""
    _assert_same_training(model_folder, adapted_layers)


@pytest.mark.parametrize("adapted_layers", [1, 2, LAYERS])
def test_other_models_are_split_and_train_as_plainly(
    other_folder: Path, adapted_layers: int
) -> None:
    """Scaled embeddings, sliding windows, layers without positions, mixtures of experts."""
    _assert_same_training(other_folder, adapted_layers)


def _assert_same_training(folder: Path, adapted_layers: int) -> None:
    """In float64 they are the same to 1e-6; in float32 the split is as near that as the plain one.

    How far apart two float32 gradients of a random model may be is a property of the model (some
    are ill-conditioned: 2e-4 of the largest value, for the plain forward too), so that any fixed
    distance between them is right for some machines only.
    """
    rows = random_rows(4, seed=5)
    longest = rows.row(int(rows.lengths.argmax()))[0].tolist()

    def both(
        model: nn.Module,
    ) -> tuple[tuple[float, dict[str, np.ndarray]], tuple[float, dict[str, np.ndarray]]]:
        forward = choose_forward(model, adapted_layers, [longest])
        assert isinstance(forward, SplitForward), forward.note
        assert forward.frozen_layers == LAYERS - adapted_layers
        plain = PlainForward(model, "")
        return loss_and_gradient(model, forward, rows), loss_and_gradient(model, plain, rows)

    model = adapted(folder, adapted_layers)
    (loss, gradient), (plain_loss, plain_gradient) = both(model)
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    if any(isinstance(module, SwitchLinear) for module in model.modules()):
        # MLX multiplies the chosen experts in float32 only, so that there is no truth to go by.
        assert gradient_difference(gradient, plain_gradient) <= 1e-4
        return
    exact = adapted(folder, adapted_layers, mx.float64)
    (exact_loss, exact_gradient), (true_loss, true_gradient) = both(exact)
    assert all(array.dtype == np.float64 for array in true_gradient.values())
    # The cross-entropy takes its logits in float32 whatever the model computes in.
    assert exact_loss == pytest.approx(true_loss, rel=1e-6)
    assert gradient_difference(exact_gradient, true_gradient) <= 1e-6
    round_off = gradient_difference(plain_gradient, true_gradient)
    assert gradient_difference(gradient, true_gradient) <= max(1e-5, 3 * round_off)


def test_a_plain_model_trains_the_same_as_a_split_one(make_inputs: MakeInputs) -> None:
    # A gentle rate: at 1e-2 Adam makes a full step of a gradient that is all round-off.
    fast, plain = (make_inputs(folder=name, learning_rate=1e-3) for name in ("fast", "plain"))
    plain = replace(plain, forward=PlainForward(plain.model, "asked for"))
    assert isinstance(fast.forward, SplitForward)
    one, other = train_here(fast), train_here(plain)
    assert one.final_validation_loss == pytest.approx(other.final_validation_loss, rel=1e-3)
    assert one.first_validation_loss == pytest.approx(other.first_validation_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("key", "tied"),
    [("lm_head", False), ("model.embed_tokens", False), ("model.embed_tokens", True)],
)
def test_a_head_or_an_embedding_can_be_adapted(key: str, tied: bool, tmp_path: Path) -> None:
    """As mlx-lm takes their names; then no layer is frozen, and the head has gradients."""
    model = loaded(make_other("mistral", tmp_path, tie_word_embeddings=tied))
    lora = LoraParameters(rank=4, alpha=8.0, keys=["self_attn.q_proj", key])
    recipe = TrainRecipe(num_layers=1, lora_parameters=lora)
    whole = Recipe(name="tiny", model="tiny", data=DataRecipe(path="."), train=recipe)
    shape = put_adapter(model, recipe, adapter_config(whole, 1))
    assert set(shape.modules) == {key, f"model.layers.{LAYERS - 1}.self_attn.q_proj"}
    model.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.2, model.trainable_parameters()))
    forward = choose_forward(model, 1, ROWS)
    assert isinstance(forward, SplitForward) and forward.frozen_layers == 0
    rows = random_rows(4, seed=5)
    loss, gradient = loss_and_gradient(model, forward, rows)
    plain_loss, plain_gradient = loss_and_gradient(model, PlainForward(model, ""), rows)
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert gradient_difference(gradient, plain_gradient) <= 1e-5


def test_rows_beyond_a_sliding_window_are_split_too(tmp_path: Path) -> None:
    """Layers whose kind is looked up by number keep their number in both parts."""
    window = PROOF_LOGIT_TOKENS + 8  # so that the hidden states of long rows have to tell
    model = loaded(make_other("gpt_oss", tmp_path, sliding_window=window))
    forward = choose_forward(model, 2, rows_of(window - 1, window * 2))
    assert isinstance(forward, SplitForward) and forward.frozen_layers == 1


def test_the_stage_proves_on_its_longest_row(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved: list[list[list[int]]] = []

    def remember(model: nn.Module, layers: int, rows: list[list[int]], *rest: Any) -> Forward:
        proved.append(rows)
        return choose_forward(model, layers, rows, *rest)

    monkeypatch.setattr(setup, "choose_forward", remember)
    recipe = Recipe(
        name="tiny", model="tiny", data=DataRecipe(path="."), train=TrainRecipe(num_layers=1)
    )
    splits = random_rows(9, seed=3), random_rows(4, seed=4)
    for name, split in zip(("train", "valid"), splits, strict=True):
        write_split(tmp_path / f"{name}.safetensors", split)
    request = TrainRequest(
        recipe, model_folder, tmp_path, tmp_path, "inputs", "tiny", 1 << 20, tmp_path, ()
    )
    setup.Setup(request).inputs(request)
    assert len(proved[0][0]) == max(int(split.lengths.max()) for split in splits)


class _Indexed(LlamaModel):
    """A model whose layers depend on their number, unlike anything the split can know of."""

    def __call__(
        self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        hidden = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, "causal") * (1 + number)
        normed: mx.array = self.norm(hidden)
        return normed


class _Demanding(LlamaModel):
    """Asks every layer for a part that a stand-in does not have."""

    def __call__(
        self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        assert all(layer.self_attn.n_heads for layer in self.layers)
        states: mx.array = super().__call__(inputs, cache, input_embeddings)
        return states


class _OnlyIds(LlamaModel):
    """Takes no embeddings, only ids: the split needs no more."""

    def __call__(self, inputs: mx.array, cache: Any = None, *unused: None) -> mx.array:
        states: mx.array = super().__call__(inputs, cache)
        return states


@pytest.fixture
def llama(tmp_path: Path) -> nn.Module:
    return loaded(write_tiny_model(tmp_path / "llama", layers=LAYERS))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (_Indexed, "the split of llama differs by"),
        (_Demanding, "llama does not take the split ("),
    ],
)
def test_a_model_that_cannot_be_split_is_left_whole(
    llama: nn.Module, kind: type, sentence: str
) -> None:
    llama.model.__class__ = kind
    forward = choose_forward(llama, 2, ROWS)
    assert isinstance(forward, PlainForward)
    assert forward.note.startswith("plain forward: ") and sentence in forward.note
    assert forward.frozen_layers == 0
    for row in ROWS:
        assert np.array_equal(whole_logits(forward, row), np.array(llama(mx.array([row]))[0]))


def test_layers_that_are_no_list_are_left_whole() -> None:
    class Inner(nn.Module):
        layers = object()
        norm = None

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Inner()

    forward = choose_forward(Outer(), 2, ROWS)
    assert isinstance(forward, PlainForward) and "does not take the split" in forward.note


def test_a_model_built_otherwise_is_left_whole() -> None:
    forward = choose_forward(nn.Linear(2, 2), 1, ROWS)
    assert isinstance(forward, PlainForward)
    assert "is not built as embed, layers, norm" in forward.note


def test_a_model_that_takes_no_embeddings_is_split_too(llama: nn.Module) -> None:
    llama.model.__class__ = _OnlyIds
    forward = choose_forward(llama, 1, ROWS)
    assert isinstance(forward, SplitForward) and forward.frozen_layers == LAYERS - 1


def test_nothing_is_proved_without_rows_or_with_numbers_that_are_none(llama: nn.Module) -> None:
    assert not prove_equal(llama, SplitForward(llama, 1), []).holds
    assert isinstance(choose_forward(llama, 2, []), PlainForward)
    llama.model.norm.weight = llama.model.norm.weight * float("nan")
    split = SplitForward(llama, 1)
    assert not prove_equal(llama, split, states_of_rows(split)).holds
    assert not Proof(float("nan"), EQUAL_TOLERANCE).holds
    assert Proof(EQUAL_TOLERANCE, EQUAL_TOLERANCE).holds


def test_a_wrong_head_is_found(llama: nn.Module) -> None:
    """The hidden states are right and the logits are not."""

    class WrongHead(SplitForward):
        def head(self, hidden: mx.array) -> mx.array:
            return super().head(hidden) * 1.01

    class ShortHead(SplitForward):
        def head(self, hidden: mx.array) -> mx.array:
            return super().head(hidden)[..., :-1]

    for kind in (WrongHead, ShortHead):
        split = kind(llama, 1)
        assert not prove_equal(llama, split, states_of_rows(split)).holds


QWEN3_5 = {
    "model_type": "qwen3_5",
    "text_config": {
        "model_type": "qwen3_5",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "full_attention_interval": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
}


def test_a_language_model_within_another_is_split() -> None:
    """Its rows stay padded: a recurrent state would run from one row into the next."""
    model = random_model(QWEN3_5)
    model.freeze()
    lora = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    make_trainable_layers(model, {"num_layers": 2, "lora_parameters": lora})
    rows = rows_of(57)
    forward = choose_forward(model, 2, rows)
    assert isinstance(forward, SplitForward), forward.note
    assert (forward.frozen_layers, forward.packs, forward.skips) == (2, False, True)
    ids = mx.array(rows)
    logits = forward.head(forward.top(ids, forward.prefix(ids))[0])
    assert relative_difference(logits, model(ids)[0]) < 1e-5
