"""A GPU takes the fast way in every type, and a wrong split is refused in every type.

Weights stay as stored, and products depend on their shapes as Metal's do.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_ft.engine.device import AS_GPU
from mlx_ft.engine.partial_model import Part, relative_difference
from mlx_ft.train.numerics import custom_vjp, last_layer, packed_places, packing, shared_start
from mlx_ft.train.numerics import forward as forwards
from mlx_ft.train.numerics.forward import PlainForward, SplitForward, choose_forward
from mlx_ft.train.numerics.short_attention import attention_with_gradient, plain_attention
from tests.support.gpu import (
    BASE_TYPES,
    GPU_CONFIGS,
    shape_dependent_products,
    training_attention,
    write_gpu_model,
)
from tests.support.models import write_stored_model
from tests.support.slow import fast_first
from tests.support.split_models import adapted, rows_of
from tests.support.trainings import random_rows
from tests.train.test_sixteen_bits import adapter_in, likeness, trained

LENGTHS = (20, 64, 300, 1000)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(AS_GPU, "1")
    with shape_dependent_products(), training_attention():
        yield


def model_in(folder: Path, kind: str, base_type: str, num_layers: int = 2) -> nn.Module:
    """Return a model of a kind and type, its weights as stored, its adapter not zero."""
    model = adapted(write_gpu_model(folder, kind, base_type), num_layers)
    assert model.model.norm.weight.dtype == BASE_TYPES[base_type][0], "as stored"
    return model


@pytest.mark.parametrize("base_type", BASE_TYPES)
@pytest.mark.parametrize("kind", fast_first(GPU_CONFIGS))
def test_every_type_gets_the_whole_fast_way(tmp_path: Path, kind: str, base_type: str) -> None:
    model = model_in(tmp_path / "base", kind, base_type)
    for length in LENGTHS:
        chosen = choose_forward(model, 2, rows_of(length))
        assert isinstance(chosen, SplitForward), chosen.note
        assert (chosen.packs, chosen.skips, chosen.frozen_layers) == (True, True, 1), chosen.note


@pytest.mark.parametrize("base_type", BASE_TYPES)
def test_the_same_row_in_another_shape_has_other_bits(tmp_path: Path, base_type: str) -> None:
    """Otherwise the products were not emulated, and the other tests here show nothing."""
    model = model_in(tmp_path / "base", "llama", base_type)
    (row,) = rows_of(300)
    whole = model.model(mx.array([row]))[:, :64]
    assert relative_difference(model.model(mx.array([row[:64]])), whole) > 5e-4


def _without_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def shorter(self: Part, inner: nn.Module, below: int, layers: Any, *, norm: bool) -> None:
        Part_init(self, inner, below, layers[:-1] if norm else layers, norm=norm)

    Part_init = Part.__init__
    monkeypatch.setattr(Part, "__init__", shorter)


def _rows_that_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_places, "_attention_at_places", lambda attention, _: attention)


def _skipped_positions_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    put = custom_vjp.put
    monkeypatch.setattr(
        last_layer, "put", lambda outputs, positions, rows: put(outputs, positions - 1, rows)
    )


def _keys_of_the_next_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(mask: Any, span: packing.Span) -> Any:
        return None  # every token of a row sees all of the row

    monkeypatch.setattr(packed_places, "mask_of", shifted)


@dataclass(frozen=True)
class PlantedFault:
    """A fault in the split or one of its parts, and what of (packing, skipping) is left."""

    name: str
    plant: Callable[[pytest.MonkeyPatch], None]
    left: tuple[bool, bool] | None


def planted_faults() -> list[PlantedFault]:
    """Return a fault in each part; with the first the plain forward is left."""
    return [
        PlantedFault("a layer left out", _without_a_layer, None),
        PlantedFault("rows that see each other", _rows_that_see_each_other, (False, True)),
        PlantedFault("no mask", _keys_of_the_next_row, (False, True)),
        PlantedFault("positions shifted by one", _skipped_positions_shifted, (True, False)),
    ]


@pytest.mark.parametrize("base_type", BASE_TYPES)
@pytest.mark.parametrize("kind", fast_first(GPU_CONFIGS))
def test_a_wrong_split_is_refused_and_costs_only_its_part(
    tmp_path: Path, kind: str, base_type: str
) -> None:
    model = model_in(tmp_path / "base", kind, base_type)
    for fault in planted_faults():
        with pytest.MonkeyPatch.context() as patch:
            fault.plant(patch)
            chosen = choose_forward(model, 2, rows_of(64))
        if fault.left is None:
            assert isinstance(chosen, PlainForward)
            continue
        assert isinstance(chosen, SplitForward), chosen.note
        assert (chosen.packs, chosen.skips) == fault.left, f"{fault.name}: {chosen.note}"


def _position_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = shared_start.Follower.__init__

    def shifted(self: shared_start.Follower, recorder: Any, tokens: int) -> None:
        plain(self, recorder, tokens)
        self.offset = tokens + 1

    monkeypatch.setattr(shared_start.Follower, "__init__", shifted)


def _mask_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def early(self: shared_start.Follower, tokens: int, *_: Any, **__: Any) -> mx.array:
        seen = self._recorder.keys.shape[2] + tokens
        last = mx.arange(seen - tokens, seen)[:, None] + 1
        return mx.arange(seen) <= last

    monkeypatch.setattr(shared_start.Follower, "make_mask", early)


@pytest.mark.parametrize("base_type", BASE_TYPES)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_a_shared_start_is_taken_and_a_wrong_one_refused(
    tmp_path: Path, kind: str, base_type: str
) -> None:
    model = model_in(tmp_path / "base", kind, base_type, num_layers=1)
    rows = random_rows(6, seed=5, start=24)
    longest = rows.row(int(np.argmax(rows.lengths)))[0].tolist()
    chosen = choose_forward(model, 1, [longest])
    assert isinstance(chosen, SplitForward), chosen.note
    assert shared_start.choose_start(model, chosen, [rows]) is not None
    for fault in (_position_shifted, _mask_off_by_one):
        with pytest.MonkeyPatch.context() as patch:
            fault(patch)
            assert shared_start.choose_start(model, chosen, [rows]) is None, fault.__name__


@pytest.mark.parametrize("words", ["Attempting to allocate 9 bytes", "CallbackErrorHang"])
def test_a_gpu_error_is_no_reason_to_take_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    model = model_in(tmp_path / "base", "llama", "4-bit")

    def failing(*_: Any) -> Any:
        raise RuntimeError(f"[METAL] {words}")

    for name in ("prove_equal", "prove_packing", "prove_skipping"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forwards, name, failing)
            with pytest.raises(RuntimeError, match=words):
                choose_forward(model, 2, rows_of(20))


@pytest.mark.parametrize("mask", [None, "causal", "boolean", "additive"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, 20])
def test_plain_attention_is_the_fused_one(mask: Any, sinks: bool, tokens: int) -> None:
    mx.random.seed(0)
    queries = mx.random.normal((2, 4, tokens, 64))
    keys, values = (mx.random.normal((2, 2, 24, 64)) for _ in range(2))
    if mask in ("boolean", "additive"):
        seen = mx.arange(24) <= mx.arange(24 - tokens, 24)[:, None]
        mask = seen if mask == "boolean" else mx.where(seen, 0.0, -1e9)
    drains = mx.random.normal((4,)) if sinks else None
    ours = plain_attention(queries, keys, values, scale=0.125, mask=mask, sinks=drains)
    fused = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=0.125, mask=mask, sinks=drains
    )
    assert relative_difference(ours, fused) < 1e-5


@pytest.mark.parametrize("tokens", [1, 4, 8, 9])
def test_short_attention_has_a_gradient(tokens: int) -> None:
    def loss(queries: mx.array) -> mx.array:
        keys = mx.ones((1, 1, tokens, 64))
        attention = mx.fast.scaled_dot_product_attention
        return attention(queries, keys, keys, scale=1.0, mask="causal").sum()

    queries = mx.ones((1, 1, tokens, 64))
    if tokens <= 8:
        with pytest.raises(RuntimeError, match="logsumexp"):
            mx.grad(loss)(queries)
    with attention_with_gradient():
        assert mx.isfinite(mx.grad(loss)(queries)).all().item()


@pytest.mark.parametrize("base_type", BASE_TYPES)
def test_short_rows_train_and_learn_the_same_as_with_wide_products(
    tmp_path: Path, base_type: str
) -> None:
    """From start to adapter, with rows of at most 8 tokens, which fused attention refuses."""
    base = write_gpu_model(tmp_path / "base", "llama", base_type)
    # Dropout draws a mask of the padded shape.
    lora = {"lora_parameters": {"rank": 4, "alpha": 8.0}}
    found = trained(tmp_path / "narrow", base, **lora)
    assert "as stored" in found["compute"] and "unpadded" in found["fast_path"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(AS_GPU, "0")
        wide = trained(tmp_path / "wide", base, **lora)
    assert "float32" in wide["compute"]
    for name in ("first_validation_loss", "final_validation_loss"):
        assert found[name] == pytest.approx(wide[name], rel=1 / 256), name
    assert likeness(tmp_path / "narrow", tmp_path / "wide") > 0.8


@pytest.mark.parametrize(
    "changes",
    fast_first(
        [
            {"grad_checkpoint": True},
            {"low_memory": True},
            {"low_memory": True, "grad_checkpoint": True},
            {"fine_tune_type": "dora"},
            {"fine_tune_type": "full", "learning_rate": 1e-4},
            {"micro_batch_tokens": 40, "grad_accumulation_steps": 3},
            {"optimizer": "adamw", "batch_size": 1},
            {"optimizer": "muon"},
            {"lora_parameters": {"rank": 4, "alpha": 8.0, "keys": ["self_attn.q_proj"]}},
        ],
        2,
    ),
    ids=str,
)
def test_every_setting_trains_on_a_gpu_as_on_a_cpu(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A float32 base, so that no rounding hides what a setting does otherwise."""
    config = GPU_CONFIGS["llama"] | {"num_hidden_layers": 3}
    base = write_stored_model(tmp_path / "base", config, mx.float32)
    settings = {"lora_parameters": {"rank": 4, "alpha": 8.0}} | changes
    found = trained(tmp_path / "gpu", base, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(AS_GPU, "0")
        expected = trained(tmp_path / "cpu", base, **settings)
    for name in ("first_validation_loss", "final_validation_loss", "final_train_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name
    arrays = [adapter_in(tmp_path / name) for name in ("gpu", "cpu")]
    one, other = (np.concatenate([np.array(a[n]).ravel() for n in sorted(a)]) for a in arrays)
    assert np.corrcoef(one, other)[0, 1] > 0.999
