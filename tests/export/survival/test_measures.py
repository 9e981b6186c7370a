"""What is said to survive is what is there: of weights, of outputs, of distributions.

Properties: what is stored exactly survives whole; what is gone, or buried, does not; parts of rows
add up to the whole.
"""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.export.survival.measures import (
    Change,
    Divergence,
    LayerAudit,
    Rows,
    audit_layer,
    divergence,
    model_survival,
    row_parts,
)

ROWS, INPUTS = 24, 128


def of(weight: np.ndarray) -> Rows:
    return lambda first, end: weight[first:end]


def rounded(weight: np.ndarray, bits: int, group_size: int = 64) -> np.ndarray:
    packed, scales, biases = mx.quantize(mx.array(weight), group_size, bits)
    return np.array(mx.dequantize(packed, scales, biases, group_size, bits))


def audit(size: float = 0.03, part_numbers: int = 1 << 20, seed: int = 0) -> LayerAudit:
    """A random layer with a delta of rank 2, `size` of its weights, stored in several ways."""
    random = np.random.default_rng(seed)
    base = random.normal(size=(ROWS, INPUTS)).astype(np.float32)
    low = random.normal(size=(ROWS, 2)) @ random.normal(size=(2, INPUTS))
    delta = (low * size * np.linalg.norm(base) / np.linalg.norm(low)).astype(np.float32)
    tuned = base + delta
    noise = random.normal(size=delta.shape)
    noise *= np.linalg.norm(delta) / np.linalg.norm(noise)
    stored = {
        "exact": tuned,
        "gone": base,
        "half": base + (tuned - base) / 2,
        "buried": (tuned + noise).astype(np.float32),
        **{f"{bits} bits": rounded(tuned, bits) for bits in (4, 5, 6, 8)},
    }
    inputs = random.normal(size=(40, INPUTS)).astype(np.float32)
    ways = {name: of(weight) for name, weight in stored.items()}
    shape = (ROWS, INPUTS)
    return audit_layer("layer", shape, of(base), of(tuned), ways, inputs, part_numbers)


def test_what_is_there_gone_halved_or_buried_is_said_to_be() -> None:
    found = audit()
    assert found.delta_over_weight == pytest.approx(0.03, rel=1e-3)
    exact, gone, half, buried = (found.kept[n] for n in ("exact", "gone", "half", "buried"))
    for change in (exact.weights, exact.outputs):
        assert change and (change.gain, change.noise, change.survival) == (1.0, 0.0, 1.0)
    for change in (gone.weights, gone.outputs):
        assert change and change.gain == pytest.approx(0, abs=1e-5)
        assert change.noise == pytest.approx(0, abs=1e-2)
        assert change.survival == pytest.approx(0, abs=1e-5)
    assert half.weights.gain == pytest.approx(0.5, abs=1e-3)
    assert half.weights.survival == pytest.approx(0.75, abs=1e-3)
    assert buried.weights.gain == pytest.approx(1.0, abs=0.1), "the gain alone sees nothing amiss"
    assert buried.weights.noise == pytest.approx(1.0, abs=0.1)
    assert buried.weights.survival == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_more_bits_keep_more(seed: int) -> None:
    found = audit(seed=seed)
    kept = [found.kept[f"{bits} bits"] for bits in (4, 5, 6, 8)]
    for values in (
        [each.weights.survival for each in kept],
        [each.survival for each in kept],
        [-(each.weights.noise or 0) for each in kept],
    ):
        assert values == sorted(values, key=lambda value: value or 0.0)
    assert (kept[3].survival or 0) > 0.9 > 0 > (kept[0].weights.survival or 0)


def test_a_delta_below_half_a_step_of_the_grid_vanishes() -> None:
    """A base that lies on a 4-bit grid, changed by less than half a step, is rounded back to it."""
    random = np.random.default_rng(1)
    codes = random.integers(-7, 7, (ROWS, INPUTS // 64, 64))
    codes[..., :2] = -8, 7  # the ends of the grid, which are left alone
    step = random.uniform(0.05, 0.2, codes.shape[:2])[..., None]
    change = random.uniform(-0.45, 0.45, codes.shape)
    change[..., :2] = 0
    base = (codes * step).reshape(ROWS, INPUTS).astype(np.float32)
    tuned = ((codes + change) * step).reshape(ROWS, INPUTS).astype(np.float32)
    ways = {"4": of(rounded(tuned, 4)), "8": of(rounded(tuned, 8))}
    found = audit_layer("layer", (ROWS, INPUTS), of(base), of(tuned), ways, None)
    lost, kept = found.kept["4"], found.kept["8"]
    assert lost.weights.gain == pytest.approx(0, abs=1e-3)
    assert lost.survival == pytest.approx(0, abs=1e-3)
    assert kept.weights.gain == pytest.approx(1, abs=0.01) and (kept.survival or 0) > 0.95


@given(part_numbers=st.integers(1, 2 * ROWS * INPUTS))
def test_parts_of_rows_add_up_to_the_whole(part_numbers: int) -> None:
    whole, parts = audit(part_numbers=1 << 20), audit(part_numbers=part_numbers)
    assert parts.weight == pytest.approx(whole.weight, rel=1e-12)
    assert parts.delta == pytest.approx(whole.delta, rel=1e-12)
    for way, kept in whole.kept.items():
        ours = parts.kept[way].weights
        assert ours.error == pytest.approx(kept.weights.error, rel=1e-12)
        assert ours.cross == pytest.approx(kept.weights.cross, rel=1e-9, abs=1e-12)
        # Products in float32 are added up in another order.
        assert parts.kept[way].survival == pytest.approx(kept.survival, rel=1e-4, abs=1e-6)


@given(rows=st.integers(0, 50), inputs=st.integers(0, 50), most=st.integers(1, 300))
def test_parts_have_every_row_once_and_stay_small(rows: int, inputs: int, most: int) -> None:
    parts = list(row_parts(rows, inputs, most))
    assert [row for part in parts for row in part] == list(range(rows))
    assert all(len(part) == 1 or len(part) * inputs <= most for part in parts)


def test_a_layer_that_learned_nothing_has_nothing_to_lose() -> None:
    change = Change(0.0, 0.0, 3.0)
    assert (change.gain, change.noise, change.survival) == (None, None, None)


def logs(seed: int, near: np.ndarray | None = None, apart: float = 1.0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(30, 50)) * apart
    logits = logits if near is None else near + logits
    result: np.ndarray = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return result.astype(np.float32)


def test_a_model_keeps_what_brings_it_nearer_to_the_trained_than_the_base_is() -> None:
    trained = logs(0)
    learned = divergence(trained, logs(1, trained))
    assert divergence(trained, trained) == Divergence(0.0, 0.0)
    assert model_survival(learned, divergence(trained, trained)) == 1.0
    assert model_survival(learned, learned) == 0.0
    near = model_survival(learned, divergence(trained, logs(2, trained, 0.1)))
    far = model_survival(learned, divergence(trained, logs(2, trained, 2.0)))
    assert near is not None and far is not None and 0.9 < near < 1 and far < 0
    assert model_survival(Divergence(0.0, 0.0), learned) is None, "there was nothing to keep"


def test_divergence_is_the_mean_of_kl_and_of_other_tokens() -> None:
    ours, theirs = logs(3), logs(4)
    p, q = np.exp(ours.astype(np.float64)), np.exp(theirs.astype(np.float64))
    found = divergence(ours, theirs)
    assert found.nats == pytest.approx(float((p * np.log(p / q)).sum(-1).mean()), rel=1e-5)
    assert found.flips == float(np.mean(p.argmax(-1) != q.argmax(-1)))
    assert math.isfinite(found.nats)
