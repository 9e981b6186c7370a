"""GPTQ makes up for rounding errors, in the format that mlx reads, and is rounding where it cannot.

Equivalences: packed codes read back are the codes; with inputs that have nothing in common, GPTQ is
mlx's own quantization; in parts, the same layers are quantized as at once.
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ft.export import gptq
from mlx_ft.export.calibration import see_inputs
from mlx_ft.export.gptq import (
    correction_factor,
    input_order,
    pack_codes,
    quantizable_layers,
    quantize_inputs,
    quantize_layers,
)
from mlx_ft.inference import load_weights
from tests.tiny import write_tiny_model

ROWS = [[int(token) for token in np.random.default_rng(7).integers(3, 300, 40)] for _ in range(12)]
UNSEEN = [[int(token) for token in np.random.default_rng(8).integers(3, 300, 40)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("gptq"), "llama", layers=3)


def model_of(folder: Path) -> nn.Module:
    return load_weights(folder)[0]


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
    damped = products + gptq.DAMPING * np.mean(np.diag(products)) * np.eye(24)
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


@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("qwen3", False)])
def test_an_embedding_is_quantized_here_when_it_is_the_head_too(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    model = model_of(write_tiny_model(tmp_path, model_type, layers=1))
    states = model.model(mx.array(ROWS))
    embedding = model.model.embed_tokens
    done = quantize_layers(model, ROWS, 5, 32, mx.float16, lambda n, of: None)
    assert ("model.embed_tokens" in done) == tied
    if not tied:
        assert model.model.embed_tokens is embedding
        return
    now = model.model.embed_tokens
    assert type(now) is nn.QuantizedEmbedding and (now.bits, now.group_size) == (5, 32)
    packed, scales, biases = mx.quantize(embedding.weight.astype(mx.float16), 32, 5)
    rounded = mx.dequantize(packed, scales, biases, 32, 5)
    wanted = states @ embedding.weight.T

    def error(weight: mx.array) -> float:
        return float(mx.square(states @ weight.astype(mx.float32).T - wanted).sum().item())

    ours = mx.dequantize(now.weight, now.scales, now.biases, 32, 5)
    assert error(ours) < 0.8 * error(rounded)


def test_every_linear_layer_becomes_quantized_and_says_so(folder: Path) -> None:
    model = model_of(folder)
    names = list(quantizable_layers(model, 32))
    assert len(names) == 3 * 7 + 1 and names[0].startswith("model.layers.0.")
    told: list[tuple[int, int]] = []
    done = quantize_layers(model, ROWS, 5, 32, mx.float16, lambda n, of: told.append((n, of)))
    assert sorted(done) == sorted(names) and told[-1] == (len(names), len(names))
    modules = dict(model.named_modules())
    for name in names:
        layer = modules[name]
        assert type(layer) in (nn.QuantizedLinear, nn.QuantizedEmbedding)
        assert (layer.bits, layer.group_size) == (5, 32)
        assert layer.scales.dtype == layer.biases.dtype == mx.float16
    assert np.isfinite(np.array(model(mx.array(UNSEEN)).astype(mx.float32))).all()


def test_layers_fed_alike_are_seen_once(folder: Path) -> None:
    model = model_of(folder)
    seen = see_inputs(model, quantizable_layers(model, 32), ROWS[:2])
    own = seen.owner["model.layers.0.self_attn.q_proj"]
    assert seen.owner["model.layers.0.self_attn.v_proj"] == own
    assert seen.owner["model.layers.0.mlp.up_proj"] == seen.owner["model.layers.0.mlp.gate_proj"]
    assert len(seen.products) == 3 * 4 + 1, "and the head"
    assert not any("._layer." in name for name, _ in tree_flatten(model.parameters())), "as it was"


def test_products_are_those_of_the_inputs(folder: Path) -> None:
    """The first layer's input is the normed embedding, which can be had without watching."""
    model = model_of(folder)
    rows = [row[: 10 + 3 * index] for index, row in enumerate(ROWS)]  # so that batches pad
    seen = see_inputs(model, quantizable_layers(model, 32), rows)
    first = model.model.layers[0]
    states = [first.input_layernorm(model.model.embed_tokens(mx.array(row))) for row in rows]
    inputs = np.concatenate([np.array(state) for state in states])
    ours = np.array(seen.products[seen.owner["model.layers.0.self_attn.q_proj"]])
    assert np.allclose(ours, inputs.T @ inputs, rtol=1e-4, atol=1e-3)


def test_in_parts_the_same_layers_are_quantized(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "goes_layer_by_layer", lambda model, rows: False)
    at_once, in_parts = model_of(folder), model_of(folder)
    done = quantize_layers(at_once, ROWS, 5, 32, mx.float16, lambda n, of: None)
    monkeypatch.setattr(gptq, "PRODUCT_BYTES", 1)
    one_by_one = quantize_layers(in_parts, ROWS, 5, 32, mx.float16, lambda n, of: None)
    assert sorted(done) == sorted(one_by_one)
    first = "model.layers.0.self_attn.q_proj"
    for a, b in zip(
        tree_flatten(dict(at_once.named_modules())[first].parameters()),
        tree_flatten(dict(in_parts.named_modules())[first].parameters()),
        strict=True,
    ):
        assert np.array_equal(np.array(a[1]), np.array(b[1])), "nothing lies before the first"


def test_outputs_in_chunks_are_the_outputs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, in_chunks = model_of(folder), model_of(folder)
    quantize_layers(at_once, ROWS, 5, 32, mx.float16, lambda n, of: None)
    monkeypatch.setattr(gptq, "OUTPUT_CHUNK", 24)
    quantize_layers(in_chunks, ROWS, 5, 32, mx.float16, lambda n, of: None)
    for name, module in at_once.named_modules():
        if type(module) is nn.QuantizedLinear:
            other = dict(in_chunks.named_modules())[name]
            equal = np.array(module.weight) == np.array(other.weight)
            assert equal.mean() > 0.99, f"{name}: round-off may flip a code, no more"


def divergence(model: nn.Module, other: nn.Module) -> float:
    """Return the mean divergence of next tokens on rows that nobody was calibrated on."""
    ids = mx.array([[int(t) for t in np.random.default_rng(9).integers(3, 300, 60)]] * 2)
    one, two = (each(ids).astype(mx.float32) for each in (model, other))
    one, two = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (one, two))
    return float((mx.exp(one) * (one - two)).sum(axis=-1).mean().item())


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_one_layer_after_the_other_sees_what_is_quantized_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """The first layer is quantized as with all at once, the next ones for what they will get."""
    folder = write_tiny_model(tmp_path, model_type, layers=3, bits=None)
    one_by_one, at_once = model_of(folder), model_of(folder)
    assert gptq.goes_layer_by_layer(one_by_one, ROWS)
    done = quantize_layers(one_by_one, ROWS, 3, 32, mx.float32, lambda n, of: None)
    monkeypatch.setattr(gptq, "goes_layer_by_layer", lambda model, rows: False)
    others = quantize_layers(at_once, ROWS, 3, 32, mx.float32, lambda n, of: None)
    assert sorted(done) == sorted(others)
    modules, other_modules = dict(one_by_one.named_modules()), dict(at_once.named_modules())
    assert {type(modules[name]) for name in done} <= {nn.QuantizedLinear, nn.QuantizedEmbedding}
    same = {
        name
        for name in done
        if mx.array_equal(modules[name].weight, other_modules[name].weight).item()
    }
    first = {name for name in done if ".layers.0." in name}
    last = {name for name in done if ".layers.2." in name}
    assert first <= same and not last & same


def test_both_ways_are_nearer_than_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_model(tmp_path, "llama", layers=3, bits=None)
    rows = [[int(t) for t in np.random.default_rng(i).integers(3, 300, 60)] for i in range(40)]
    whole, one_by_one, at_once, rounded = (model_of(folder) for _ in range(4))
    quantize_layers(one_by_one, rows, 3, 32, mx.float32, lambda n, of: None)
    monkeypatch.setattr(gptq, "goes_layer_by_layer", lambda model, rows: False)
    quantize_layers(at_once, rows, 3, 32, mx.float32, lambda n, of: None)
    nn.quantize(rounded, 32, 3)
    limit = 0.8 * divergence(whole, rounded)
    assert divergence(whole, one_by_one) < limit and divergence(whole, at_once) < limit


def test_a_model_that_cannot_go_layer_by_layer_goes_as_a_whole(folder: Path) -> None:
    model = model_of(folder)

    class Asking(type(model.model)):  # type: ignore[misc]  # asks its layers for their weights
        def __call__(self, ids: mx.array, *arguments: object) -> mx.array:
            assert all(each.self_attn.n_heads for each in self.layers)
            return super().__call__(ids, *arguments)

    model.model.__class__ = Asking
    assert not gptq.goes_layer_by_layer(model, ROWS)
    done = quantize_layers(model, ROWS, 5, 32, mx.float16, lambda n, of: None)
    assert len(done) == 3 * 7 + 1
