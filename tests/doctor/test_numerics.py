"""A sound device has no failure, and each planted fault fails in its own line."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_ft.doctor import numerics
from mlx_ft.doctor.checks import Check, guarded
from mlx_ft.doctor.miniature import Step
from mlx_ft.engine.device import AS_GPU
from mlx_ft.engine.partial_model import Part
from mlx_ft.train.numerics import packing


@pytest.mark.parametrize("name", [name for name, _ in numerics.numerics()])
def test_this_device_is_sound(name: str) -> None:
    check = dict(numerics.numerics())[name]()
    assert check.status == "ok", check
    assert check.figures and not check.advice


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in numerics.numerics()])
def test_and_so_it_is_in_a_gpus_way(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(AS_GPU, "1")
    assert dict(numerics.numerics())[name]().status == "ok"


def test_a_wrong_split_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Part.__init__

    def shorter(self: Part, inner: Any, below: int, layers: Any, *, norm: bool) -> None:
        plain(self, inner, below, layers[:-1] if norm else layers, norm=norm)

    monkeypatch.setattr(Part, "__init__", shorter)
    check = numerics.forward_chosen()
    assert check.status == "warn" and "plain forward" in check.found


def test_rows_that_have_to_be_padded_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_attention_of_rows", lambda attention, _: attention)
    check = numerics.forward_chosen()
    assert check.status == "warn" and "padded" in check.found


def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = numerics._gradient
    calls = []

    def wrong_after_the_reference(in_float32: bool) -> np.ndarray:
        calls.append(in_float32)
        gradient = found(in_float32)
        if len(calls) > 1:
            gradient[: gradient.size // 100] = 0
        return gradient

    monkeypatch.setattr(numerics, "_gradient", wrong_after_the_reference)
    assert numerics.gradient().status == "fail"


def test_other_bits_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    after = numerics._after_steps

    def nearly(resumed: bool) -> dict[str, mx.array]:
        arrays = after(resumed)
        return {n: a * (1 + 1e-6) for n, a in arrays.items()} if resumed else arrays

    monkeypatch.setattr(numerics, "_after_steps", nearly)
    check = numerics.same_bits()
    assert check.status == "warn" and check.advice


@pytest.mark.parametrize(("share", "status"), [(0.5, "warn"), (3.0, "fail")])
def test_other_quantized_weights_are_told_by_how_far(
    monkeypatch: pytest.MonkeyPatch, share: float, status: str
) -> None:
    plain = mx.quantize

    def other(weight: mx.array, group_size: int, bits: int, **named: Any) -> Any:
        packed, scales, biases = plain(weight, group_size, bits, **named)
        if named or bits != 5:
            return packed, scales, biases
        return packed, scales, biases + share * mx.abs(scales).max()

    monkeypatch.setattr(mx, "quantize", other)
    check = numerics.quantization()
    assert check.status == status and "5 bits" in check.found and "4" not in check.found.split()[0]


def test_no_finite_loss_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Step, "take", lambda _: float("nan"))
    check = numerics.short_rows()
    assert check.status == "fail" and "4, 9, 300" in check.found


@pytest.mark.parametrize(
    ("error", "words"),
    [(RuntimeError("[METAL] Caused GPU Hang"), "hung"), (KeyError("x"), "KeyError")],
)
def test_a_check_that_breaks_is_a_failure_in_words(error: Exception, words: str) -> None:
    def breaks() -> Check:
        raise error

    check = guarded("gradient", breaks)
    assert check.status == "fail" and words in check.found and check.advice
