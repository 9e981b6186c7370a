"""GPTQ makes up for rounding errors, in the format that mlx reads, and is rounding where it cannot.

Equivalences: packed codes read back are the codes; with inputs that have nothing in common, GPTQ is
mlx's own quantization; in parts, the same layers are quantized as at once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ft.engine.load import load_weights, scalar
from mlx_ft.export import gptq, gptq_math
from mlx_ft.export.calibration import input_statistics
from mlx_ft.export.fuse import FusedModel, fuse
from mlx_ft.export.gptq import quantizable_layers, quantize_at_once, quantize_by_layers
from mlx_ft.export.gptq_math import (
    QuantizationSettings,
    correction_factor,
    input_order,
    pack_codes,
    quantize_inputs,
)
from mlx_ft.export.layerwise import is_in_layers, layerwise_difference
from mlx_ft.export.layerwise_models import layerwise_of_folder, layerwise_of_fused
from tests.support.models import write_tiny_model

Rows = list[list[int]]
ROWS: Rows = [
    [int(token) for token in np.random.default_rng(7).integers(3, 300, 40)] for _ in range(12)
]
UNSEEN = [[int(token) for token in np.random.default_rng(8).integers(3, 300, 40)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("gptq"), "llama", layers=3)


def whole(folder: Path) -> FusedModel:
    """Return a base with no adapter, in memory as a whole."""
    fused = fuse(folder, None, "float16")
    fused.load("")
    return fused


@dataclass
class Quantized:
    """What GPTQ gave out: the names in order, its progress, and the parts of each weight."""

    settings: QuantizationSettings
    names: tuple[str, ...] = ()
    progress: list[tuple[float, str]] = field(default_factory=list)
    parts: dict[str, list[tuple[mx.array, ...]]] = field(default_factory=dict)

    def write(self, name: str, first: int, *arrays: mx.array) -> None:
        held = self.parts.setdefault(name, [])
        assert first == sum(len(part[0]) for part in held), "one part after the other"
        held.append(arrays)

    def update(self, done: float, text: str = "") -> None:
        self.progress.append((done, text))

    def packed(self, name: str) -> tuple[mx.array, mx.array, mx.array]:
        packed, scales, biases = (
            mx.concatenate(list(each)) for each in zip(*self.parts[name], strict=True)
        )
        return packed, scales, biases

    def weight(self, name: str) -> mx.array:
        packed, scales, biases = self.packed(name)
        wide = (scales.astype(mx.float32), biases.astype(mx.float32))
        return mx.dequantize(packed, *wide, self.settings.group_size, self.settings.bits)


def by_layers(
    folder: Path, bits: int = 5, rows: Rows = ROWS, dtype: mx.Dtype = mx.float16
) -> Quantized:
    """Quantize all layers and the head, one layer after the other."""
    fused, done = fuse(folder, None, "float16"), Quantized(QuantizationSettings(bits, 32, dtype))
    head = "lm_head" if "lm_head.weight" in fused.weights else "model.embed_tokens"
    layers = quantizable_layers(fused, 32)
    here = {name: layers[name] for name in layers if is_in_layers(name) or name == head}
    model = layerwise_of_fused(fused)
    done.names = quantize_by_layers(model, here, rows, done.settings, done.write, done)
    return done


def at_once(
    folder: Path, bits: int = 5, rows: Rows = ROWS, dtype: mx.Dtype = mx.float16
) -> Quantized:
    """Quantize what the rows go through, with the whole model in memory."""
    fused, done = whole(folder), Quantized(QuantizationSettings(bits, 32, dtype))
    layers = quantizable_layers(fused, 32)
    done.names = quantize_at_once(fused.plain, layers, rows, done.settings, done.write, done)
    return done


def with_weights(folder: Path, quantized: Quantized) -> nn.Module:
    """Return the model with what the quantized weights stand for."""
    model = whole(folder).plain
    model.load_weights(
        [(f"{n}.weight", quantized.weight(n)) for n in quantized.names], strict=False
    )
    return model


def restored(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    size = codes.shape[1] // scales.shape[1]
    wide = (np.repeat(array, size, axis=1) for array in (scales, biases))
    scale, bias = wide
    result: np.ndarray = codes * scale + bias
    return result


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_codes_are_what_mlx_reads(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 128)).astype(np.uint8)
    ones, zeros = mx.ones((3, 2)), mx.zeros((3, 2))
    read = mx.dequantize(pack_codes(codes, bits), ones, zeros, 64, bits)
    assert np.array_equal(np.array(read), codes)


def test_the_factor_is_a_root_of_the_inverse() -> None:
    inputs = np.random.default_rng(0).normal(size=(200, 24)).astype(np.float32)
    products = inputs.T @ inputs
    factor = correction_factor(products).astype(np.float64)
    assert np.array_equal(factor, np.triu(factor))
    damped = products + gptq_math.DAMPING * np.mean(np.diag(products)) * np.eye(24)
    assert np.allclose(factor.T @ factor @ damped, np.eye(24), atol=1e-4)


def test_layers_that_see_nothing_have_a_factor() -> None:
    assert np.allclose(correction_factor(np.zeros((8, 8), np.float32)), np.eye(8))


@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_unrelated_inputs_make_it_plain_rounding(bits: int, group_size: int) -> None:
    weight = np.random.default_rng(1).normal(size=(16, 128)).astype(np.float32)
    eye = correction_factor(np.eye(128, dtype=np.float32))
    ours = restored(*quantize_inputs(weight, eye, np.arange(128), bits, group_size, mx.float32))
    packed, scales, biases = mx.quantize(mx.array(weight), group_size, bits)
    plain = np.array(mx.dequantize(packed, scales, biases, group_size, bits))
    assert np.abs(ours - plain).max() < 1e-5


@pytest.mark.parametrize("inputs", [64, 192])
def test_outputs_stay_closer_than_with_rounding(inputs: int) -> None:
    """Inputs that share a few directions, as hidden states do: less than half of the error."""
    generator = np.random.default_rng(2)
    shared = generator.normal(size=(600, 12)) @ generator.normal(size=(12, inputs))
    seen = (shared + 0.3 * generator.normal(size=shared.shape)).astype(np.float32)
    weight = generator.normal(size=(40, inputs)).astype(np.float32)
    products = seen.T @ seen
    order = input_order(products, 64)
    factor = correction_factor(products[np.ix_(order, order)])
    ours = restored(*quantize_inputs(weight, factor, order, 4, 64, mx.float16))
    eye, as_they_are = np.eye(inputs, dtype=np.float32), np.arange(inputs)
    plain = restored(*quantize_inputs(weight, eye, as_they_are, 4, 64, mx.float16))

    def error(quantized: np.ndarray) -> float:
        return float(np.square(seen @ (quantized - weight).T).sum())

    assert error(ours) < 0.5 * error(plain)


def test_inputs_go_from_the_largest_to_the_smallest_and_groups_stay_together() -> None:
    size = np.random.default_rng(3).uniform(size=96)
    order = input_order(np.diag(size).astype(np.float32), 32)
    assert sorted(order) == list(range(96))
    groups = order.reshape(3, 32) // 32
    assert (groups == groups[:, :1]).all(), "one group after the other"
    sums = size.reshape(3, 32).sum(axis=1)
    assert list(groups[:, 0]) == sorted(range(3), key=lambda group: -sums[group])
    within = size[order].reshape(3, 32)
    assert (np.diff(within, axis=1) <= 0).all()


def test_unrelated_inputs_in_any_order_are_plain_rounding() -> None:
    weight = np.random.default_rng(1).normal(size=(16, 128)).astype(np.float32)
    size = np.random.default_rng(2).uniform(1, 2, 128).astype(np.float32)
    order = input_order(np.diag(size), 64)
    assert order[0] != 0
    factor = correction_factor(np.diag(size[order]))
    ours = restored(*quantize_inputs(weight, factor, order, 5, 64, mx.float32))
    packed, scales, biases = mx.quantize(mx.array(weight), 64, 5)
    plain = np.array(mx.dequantize(packed, scales, biases, 64, 5))
    assert np.abs(ours - plain).max() < 1e-5


@pytest.mark.parametrize("way", [by_layers, at_once])
@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("qwen3", False)])
def test_an_embedding_is_quantized_here_when_it_is_the_head_too(
    tmp_path: Path, model_type: str, tied: bool, way: Callable[[Path], Quantized]
) -> None:
    folder = write_tiny_model(tmp_path, model_type, layers=1)
    done = way(folder)
    assert ("model.embed_tokens" in done.names) == tied
    assert ("lm_head" in done.names) == (not tied)
    if not tied:
        return
    model = whole(folder).plain
    embedding = model.model.embed_tokens.weight
    states = model.model(mx.array(ROWS))
    packed, scales, biases = mx.quantize(embedding.astype(mx.float16), 32, 5)
    rounded = mx.dequantize(packed, scales, biases, 32, 5)
    wanted = states @ embedding.T

    def error(weight: mx.array) -> float:
        return scalar(mx.square(states @ weight.astype(mx.float32).T - wanted).sum())

    assert error(done.weight("model.embed_tokens")) < 0.8 * error(rounded)


@pytest.mark.parametrize("way", [by_layers, at_once])
def test_every_linear_layer_is_quantized_and_says_so(
    folder: Path, way: Callable[[Path], Quantized]
) -> None:
    fused = fuse(folder, None, "float16")
    names = list(quantizable_layers(fused, 32))
    assert len(names) == 3 * 7 + 1 and names[0].startswith("model.layers.0.")
    done = way(folder)
    assert sorted(done.names) == sorted(names)
    total = len(names)
    assert done.progress == [(n / total, f"layer {n} of {total}") for n in range(1, total + 1)]
    for name in names:
        outputs, inputs = fused.weights[f"{name}.weight"].shape
        packed, scales, biases = done.packed(name)
        assert packed.shape == (outputs, inputs * 5 // 32) and packed.dtype == mx.uint32
        assert scales.shape == biases.shape == (outputs, inputs // 32)
        assert scales.dtype == biases.dtype == mx.float16
    logits = with_weights(folder, done)(mx.array(UNSEEN))
    assert np.isfinite(np.array(logits.astype(mx.float32))).all()


def test_layers_fed_alike_are_seen_once(folder: Path) -> None:
    fused = whole(folder)
    seen = input_statistics(fused.plain, quantizable_layers(fused, 32), ROWS[:2])
    own = seen.owner["model.layers.0.self_attn.q_proj"]
    assert seen.owner["model.layers.0.self_attn.v_proj"] == own
    assert seen.owner["model.layers.0.mlp.up_proj"] == seen.owner["model.layers.0.mlp.gate_proj"]
    assert len(seen.products) == 3 * 4 + 1, "and the head"
    names = [name for name, _ in tree_flatten(fused.plain.parameters())]
    assert not any("._layer." in name for name in names), "as it was"


def test_products_are_those_of_the_inputs(folder: Path) -> None:
    """The first layer's input is the normed embedding, which can be had without watching."""
    fused = whole(folder)
    rows = [row[: 10 + 3 * index] for index, row in enumerate(ROWS)]  # so that batches pad
    seen = input_statistics(fused.plain, quantizable_layers(fused, 32), rows)
    inner = fused.plain.model
    first = inner.layers[0]
    states = [first.input_layernorm(inner.embed_tokens(mx.array(row))) for row in rows]
    inputs = np.concatenate([np.array(state) for state in states])
    ours = np.array(seen.products[seen.owner["model.layers.0.self_attn.q_proj"]])
    assert np.allclose(ours, inputs.T @ inputs, rtol=1e-4, atol=1e-3)


def test_in_parts_the_same_layers_are_quantized(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_run = at_once(folder)
    monkeypatch.setattr(gptq, "PRODUCT_BYTES", 1)
    in_parts = at_once(folder)
    assert sorted(whole_run.names) == sorted(in_parts.names)
    first = "model.layers.0.self_attn.q_proj"
    for one, other in zip(whole_run.packed(first), in_parts.packed(first), strict=True):
        assert mx.array_equal(one, other).item(), "nothing lies before the first"


@pytest.mark.parametrize("limit", ["OUTPUT_CHUNK", "CHUNK_BYTES"])
def test_outputs_in_chunks_are_the_outputs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    whole_run = by_layers(folder)
    monkeypatch.setattr(gptq_math, limit, {"OUTPUT_CHUNK": 24, "CHUNK_BYTES": 24 * 4 * 64}[limit])
    in_chunks = by_layers(folder)
    assert len(in_chunks.parts["model.embed_tokens"]) == -(-320 // 24)
    first = "model.layers.0.self_attn.q_proj"
    for name in (first, "model.embed_tokens"):
        equal = np.array(whole_run.packed(name)[0]) == np.array(in_chunks.packed(name)[0])
        limit_equal = 0.99 if name == first else 0.9
        assert equal.mean() > limit_equal, f"{name}: round-off may flip a code, no more"


def divergence(model: nn.Module, other: nn.Module) -> float:
    """Return the mean divergence of next tokens on rows that nobody was calibrated on."""
    ids = mx.array([[int(t) for t in np.random.default_rng(9).integers(3, 300, 60)]] * 2)
    one, two = (each(ids).astype(mx.float32) for each in (model, other))
    one, two = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (one, two))
    return float((mx.exp(one) * (one - two)).sum(axis=-1).mean().item())


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_one_layer_after_the_other_sees_what_is_quantized_already(
    tmp_path: Path, model_type: str
) -> None:
    """The first layer is quantized as with all at once, the next ones for what they will get."""
    folder = write_tiny_model(tmp_path, model_type, layers=3, bits=None)
    one_by_one, together = by_layers(folder, 3), at_once(folder, 3)
    assert sorted(one_by_one.names) == sorted(together.names)
    same = {
        name
        for name in one_by_one.names
        if mx.array_equal(one_by_one.packed(name)[0], together.packed(name)[0]).item()
    }
    first = {name for name in one_by_one.names if ".layers.0." in name}
    last = {name for name in one_by_one.names if ".layers.2." in name}
    assert first <= same and not last & same


def test_both_ways_are_nearer_than_rounding(tmp_path: Path) -> None:
    """With scales in float32: float16 ones make as much noise in so small a model as is saved."""
    folder = write_tiny_model(tmp_path, "llama", layers=3, bits=None)
    rows = [[int(t) for t in np.random.default_rng(i).integers(3, 300, 60)] for i in range(40)]
    model, rounded = whole(folder).plain, whole(folder).plain
    nn.quantize(rounded, 32, 3)
    limit = 0.8 * divergence(model, rounded)
    for way in (by_layers, at_once):
        assert divergence(model, with_weights(folder, way(folder, 3, rows, mx.float32))) < limit


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
@pytest.mark.parametrize("bits", [4, None])
def test_a_model_taken_layer_by_layer_is_the_model(
    tmp_path: Path, model_type: str, bits: int | None
) -> None:
    layers = 7 if model_type == "gemma3_text" else 3
    folder = write_tiny_model(tmp_path, model_type, layers=layers, bits=bits)
    layerwise = layerwise_of_folder(folder)
    assert layerwise_difference(layerwise, layerwise_of_folder(folder), ROWS[0]) is None
    layerwise = layerwise_of_folder(folder)  # what went through one is gone from it
    states = layerwise.states([mx.array(UNSEEN)])[0]
    parts = [layerwise.logits(states[0], first, first + 80) for first in range(0, 320, 80)]
    logits = load_weights(folder)[0](mx.array(UNSEEN))[0]
    difference = mx.abs(mx.concatenate(parts, axis=1) - logits).max() / mx.abs(logits).max()
    assert scalar(difference) < 2e-3


def test_a_model_that_asks_its_layers_for_more_is_taken_as_a_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layerwise = layerwise_of_folder(folder)

    class Asking(type(layerwise.model.model)):  # type: ignore[misc]  # asks its layers for their parts
        def __call__(self, ids: mx.array, *arguments: object) -> mx.array:
            assert all(each.self_attn.n_heads for each in self.layers)
            states: mx.array = super().__call__(ids, *arguments)
            return states

    layerwise.model.model.__class__ = Asking
    assert "llama does not take it" in (
        layerwise_difference(layerwise, layerwise_of_folder(folder), ROWS[0]) or ""
    )
