"""On a GPU a right export passes and a wrong one is refused, in every type of base.

Weights stay as stored, and products of 16 bits depend on their shapes as Metal's do.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from scipy.special import log_softmax

from mlx_ft.engine.device import AS_GPU
from mlx_ft.engine.generate import generate
from mlx_ft.engine.likelihood import likelihoods
from mlx_ft.engine.load import hold_for_cpu, load_model, load_weights, read_lazily, widen_scales
from mlx_ft.engine.partial_model import relative_difference
from mlx_ft.errors import GateFailed
from mlx_ft.export import fuse as fusing
from mlx_ft.export.build import ExportInputs, export_model
from mlx_ft.export.fuse import FuseRows
from mlx_ft.export.verify_logits import prompt_logits
from mlx_ft.model.chat import ChatFormat
from mlx_ft.system.console import Console
from tests.support.exports import export_inputs, trained_adapter
from tests.support.gpu import BASE_TYPES, shape_dependent_products, write_gpu_model
from tests.support.models import stored_arrays
from tests.support.slow import fast_first

_IDS = [int(token) for token in np.random.default_rng(0).integers(3, 320, 76)]
ROWS = [_IDS[:40], _IDS[40:64], _IDS[64:]]
# An adapter within the layers lets the model go through layer by layer, one on the embedding not.
WAYS = {"by layers": "lora", "whole": "embedding"}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(AS_GPU, "1")
    with shape_dependent_products():
        yield


def made(tmp_path: Path, base_type: str, kind: str, **recipe: Any) -> ExportInputs:
    base = write_gpu_model(tmp_path / "base", "llama", base_type, layers=2)
    adapter = trained_adapter(base, kind, tmp_path / "adapter")
    asked = {"min_survival": None, "q_method": "round", **recipe}
    return export_inputs(base, adapter, tmp_path / "export", held_out=ROWS, **asked)


def exported(inputs: ExportInputs) -> tuple[dict[str, Any], str]:
    said = io.StringIO()
    return export_model(inputs, Console(said)), said.getvalue()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base_type", BASE_TYPES)
@pytest.mark.parametrize("dtype", fast_first(["float16", "bfloat16"]))
def test_a_right_export_passes(tmp_path: Path, base_type: str, way: str, dtype: str) -> None:
    inputs = made(tmp_path, base_type, WAYS[way], dtype=dtype, q_method="gptq")
    info, said = exported(inputs)
    assert all(check["ok"] for check in info["checks"]) and info["dtype"] == dtype
    assert ("whole model is held in memory" in said) is (way == "whole")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base_type", fast_first(["4-bit", "bfloat16", "float16", "5-bit"]))
def test_a_gpu_exports_the_bits_that_a_cpu_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_type: str, way: str
) -> None:
    """GPTQ's codes too: all of it is computed in float32, from weights of any type. Functions of a
    CPU's own, which round in another way, are left out.
    """
    monkeypatch.setattr("mlx_ft.engine.cpu_kernels.on_cpu", lambda: False)
    inputs = made(tmp_path, base_type, WAYS[way], q_method="gptq")
    other = replace(inputs, folder=tmp_path / "cpu")
    other.folder.mkdir()
    on_gpu, _ = exported(inputs)
    monkeypatch.setenv(AS_GPU, "0")
    on_cpu, _ = exported(other)
    assert on_gpu["quantized"]["gptq_layers"] == on_cpu["quantized"]["gptq_layers"] > 0
    for name in ("fused-f16", "q5"):
        one, two = (
            stored_arrays(each.folder / name / "model.safetensors") for each in (inputs, other)
        )
        assert one.keys() == two.keys()
        assert all(mx.array_equal(one[key], two[key]).item() for key in one), name


def _scaled(factor: float) -> Callable[[FuseRows, int], FuseRows]:
    def wrong(fuse: FuseRows, number: int) -> FuseRows:
        return lambda first, end, rows: rows + factor * (fuse(first, end, rows) - rows)

    return wrong


def _one_left_out(fuse: FuseRows, number: int) -> FuseRows:
    return fuse if number else lambda first, end, rows: rows


def _transposed(fuse: FuseRows, number: int) -> FuseRows:
    def wrong(first: int, end: int, rows: mx.array) -> mx.array:
        delta = fuse(first, end, rows) - rows
        return rows + delta.T.reshape(delta.shape)

    return wrong


FAULTS = {
    "a scale that is off by a tenth": _scaled(1.1),
    "a scale twice too large": _scaled(2.0),
    "left out": _scaled(0.0),
    "one layer left out": _one_left_out,
    "transposed": _transposed,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("base_type", BASE_TYPES)
@pytest.mark.parametrize("way", fast_first(["whole", "by layers"]))
@pytest.mark.parametrize("dtype", fast_first(["float16", "bfloat16"]))
def test_a_wrong_fusion_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    base_type: str,
    fault: str,
    dtype: str,
) -> None:
    inputs = made(tmp_path, base_type, WAYS[way], dtype=dtype)
    plain, fused = fusing._fusing, []

    def wrong(module: nn.Module) -> FuseRows:
        fused.append(module)
        return FAULTS[fault](plain(module), len(fused) - 1)

    monkeypatch.setattr(fusing, "_fusing", wrong)
    with pytest.raises(GateFailed, match="fused model equals base with adapter"):
        exported(inputs)
    assert fused, "the fault was planted"


def exact_model(folder: Path) -> nn.Module:
    """Return a model with each weight expanded to float32, number for number."""
    model, _ = read_lazily(folder)
    return hold_for_cpu(widen_scales(model))


def short_logits(model: nn.Module, row: list[int]) -> np.ndarray:
    """Return the logits (T, vocabulary) of the plain forward in the stored type."""
    return np.array(model(mx.array([row]))[0].astype(mx.float32))


@pytest.mark.parametrize("base_type", BASE_TYPES)
def test_stored_weights_are_compared_as_if_expanded(tmp_path: Path, base_type: str) -> None:
    """The plain forward in 16 bits is further away by 500 times or more."""
    base = write_gpu_model(tmp_path / "base", "llama", base_type)
    stored, _, _ = load_weights(base)
    before = tree_flatten(stored.parameters())
    (wide,) = prompt_logits(stored, ROWS[:1])
    (exact,) = prompt_logits(exact_model(base), ROWS[:1])
    assert relative_difference(mx.array(wide), mx.array(exact)) < 1e-6
    short = short_logits(stored, ROWS[0])
    assert relative_difference(mx.array(short), mx.array(exact)) > 5e-4
    after = tree_flatten(stored.parameters())
    assert [(n, a.dtype, a.shape) for n, a in after] == [(n, a.dtype, a.shape) for n, a in before]
    assert np.array_equal(short_logits(stored, ROWS[0]), short), "the model is as it was"


def test_an_exported_model_answers_and_is_judged_as_its_numbers_say(tmp_path: Path) -> None:
    """Losses, alone and in a batch, are as near to float32 as the plain forward in 16 bits; so is
    each token of an answer to the likeliest one.
    """
    inputs = made(tmp_path, "4-bit", "lora")
    exported(inputs)
    folder = inputs.folder / "q5"
    loaded, exact = load_model(folder, ChatFormat()), exact_model(folder)
    logs = [log_softmax(logits, axis=1) for logits in prompt_logits(exact, ROWS)]
    noise = max(
        np.abs(log_softmax(short_logits(loaded.model, row), axis=1) - log).max()
        for row, log in zip(ROWS, logs, strict=True)
    )
    assert 1e-3 < noise < 0.5, "wrong logits are off by several"
    prompts, answers = [row[:9] for row in ROWS], [row[9:] for row in ROWS]
    together = likelihoods(loaded, prompts, answers)
    alone = [likelihoods(loaded, [p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
    for found in (together, alone):
        for one, log, row in zip(found, logs, ROWS, strict=True):
            wanted = [log[place - 1, row[place]] for place in range(9, len(row))]
            assert np.abs(np.subtract(one.log_probabilities, wanted)).max() <= 2 * noise
    said = generate(loaded, prompts, max_tokens=12, batch_size=2)
    for prompt, answer in zip(prompts, said, strict=True):
        (logits,) = prompt_logits(exact, [[*prompt, *answer.ids]])
        for place, token in enumerate(answer.ids, start=len(prompt) - 1):
            assert logits[place].max() - logits[place, token] <= 4 * noise
    assert any(answer.ids for answer in said)
