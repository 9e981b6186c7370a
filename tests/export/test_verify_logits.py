"""Differences added up over parts of the vocabulary are those of all logits at once."""

import mlx.core as mx
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.export.verify_logits import Comparison, Difference, differences

PAIR = ("reference", "other")


def plainly(reference: np.ndarray, other: np.ndarray, lengths: list[int]) -> Difference:
    """The same by the definitions, in float64."""
    p, q = (scipy.special.log_softmax(x.astype(np.float64), axis=1) for x in (reference, other))
    ends = np.cumsum(lengths)
    worst = max(
        float(np.abs(reference[a:b] - other[a:b]).max() / np.abs(reference[a:b]).max())
        for a, b in zip(ends - lengths, ends, strict=True)
    )
    flips = float((p.argmax(axis=1) != q.argmax(axis=1)).mean())
    return Difference(worst, float((np.exp(p) * (p - q)).sum(axis=1).mean()), flips)


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.sampled_from([0.01, 1.0, 30.0]),
)
def test_in_parts_as_at_once(seed: int, lengths: list[int], words: list[int], size: float) -> None:
    generator = np.random.default_rng(seed)
    shape = (sum(lengths), sum(words))
    reference = (size * generator.normal(size=shape)).astype(np.float32)
    other = reference + (0.3 * size * generator.normal(size=shape)).astype(np.float32)
    comparison = Comparison(np.repeat(np.arange(len(lengths)), lengths), [PAIR])
    first = 0
    for count in words:
        part = slice(first, first + count)
        models = {"reference": reference[:, part], "other": other[:, part]}
        comparison.add({name: mx.array(logits) for name, logits in models.items()}, first)
        first += count
    found, wanted = comparison.differences()[PAIR], plainly(reference, other, lengths)
    assert found.largest == pytest.approx(wanted.largest, rel=1e-5)
    assert found.divergence == pytest.approx(wanted.divergence, rel=1e-3, abs=2e-6)
    assert found.flips == wanted.flips


@pytest.mark.parametrize("apart", [1e-3, 0.1, 1.0])
def test_a_whole_vocabulary_of_a_real_model_in_float32(
    monkeypatch: pytest.MonkeyPatch, apart: float
) -> None:
    """In parts of any size within 2e-7 nats and 2e-6 of float64; float16 weights move 2e-6."""
    generator = np.random.default_rng(0)
    reference = (3 * generator.normal(size=(6, 1 << 17))).astype(np.float32)
    other = reference + (apart * generator.normal(size=reference.shape)).astype(np.float32)
    wanted = plainly(reference, other, [6])
    for part_bytes in (1 << 14, 1 << 24):
        monkeypatch.setattr("mlx_ft.export.verify_logits.LOGIT_BYTES", part_bytes)
        found = differences({"reference": [reference], "other": [other]}, [PAIR])[PAIR]
        assert found.divergence == pytest.approx(wanted.divergence, rel=2e-6, abs=2e-7)
        assert found.largest == pytest.approx(wanted.largest)
        assert found.flips == wanted.flips


def test_no_float64_array_is_given_to_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has no such type."""
    plain, given = mx.array, []

    def array(values: np.ndarray) -> mx.array:
        given.append(values.dtype)
        return plain(values)

    monkeypatch.setattr("mlx_ft.export.verify_logits.mx.array", array)
    logits = [np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)]
    differences({"reference": logits, "other": logits}, [PAIR])
    assert given and set(given) == {np.dtype(np.float32)}


def test_divergence_is_zero_of_itself_and_grows() -> None:
    generator = np.random.default_rng(0)
    logits = [generator.normal(size=(5, 40)).astype(np.float32)]
    near = [logits[0] + 0.01 * generator.normal(size=(5, 40)).astype(np.float32)]
    far = [generator.normal(size=(5, 40)).astype(np.float32)]
    models = {"reference": logits, "same": logits, "near": near, "far": far}
    found = differences(models, [("reference", name) for name in ("same", "near", "far")])
    same, close, wide = found.values()
    assert same.divergence == pytest.approx(0.0, abs=1e-6)
    assert same == Difference(0.0, same.divergence, 0.0)
    assert 1e-6 < close.divergence < wide.divergence and wide.flips > 0


def test_what_is_not_a_number_is_no_agreement() -> None:
    logits = [np.zeros((3, 8), np.float32)]
    broken = [np.full((3, 8), np.nan, np.float32)]
    found = differences({"reference": logits, "other": broken}, [PAIR])[PAIR]
    assert not found.largest <= 1e9 and not found.divergence <= 1e9
