"""Definitions of gain, noise and survival, and the sums over a layer's rows that they need.

Does: sum, in float64 and a few rows at a time, the error of a stored layer against the trained one;
compare next-token distributions. Does not: read files, run models, or judge.

Definitions. W is a weight before training, D the delta of training, E the error of storing: the
stored weight - (W + D). The whole change is C = D + E.

- gain = <C, D> / <D, D>: the share of D that is stored. 1: all of it, 0: none, whatever the noise.
- noise = |C - gain D| / |D|: the rest of the change; at 1 it is as large as D.
- survival = 1 - |E|^2 / |D|^2 = 1 - (1 - gain)^2 - noise^2, so both count. 0 where D is gone, and
  where noise is as large as D; negative where noise is larger.
- of outputs: the same with D x, E x and W x in place of D, E and W, over inputs x that were not
  trained or calibrated on. GPTQ makes errors of weights cancel there. D is large there, because it
  was trained for inputs like these.
- of a model: survival = 1 - KL(trained || stored) / KL(trained || base), of next-token
  distributions, where tokens were trained. KL is quadratic in small changes, as |E|^2 is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
# (first row, end row) of a weight, experts stacked as rows -> these rows (rows, inputs)
Rows = Callable[[int, int], Floats]
# Numbers of a weight that are summed at a time; in float64 they take 16 MiB.
PART_NUMBERS = 1 << 21
# Below this divergence (nats) nothing was learned that could survive.
LEAST_DIVERGENCE = 1e-6


@dataclass(frozen=True)
class Change:
    """Sums of squares and products over rows: <D, D>, <E, D> and <E, E>."""

    delta: float = 0.0
    cross: float = 0.0
    error: float = 0.0

    def __add__(self, other: Change) -> Change:
        return Change(self.delta + other.delta, self.cross + other.cross, self.error + other.error)

    @property
    def gain(self) -> float | None:
        """Share of the delta that is stored; None when the delta is zero."""
        return None if self.delta == 0 else 1 + self.cross / self.delta

    @property
    def noise(self) -> float | None:
        """Size of the rest of the change, relative to the delta; None when the delta is zero."""
        if self.delta == 0:
            return None
        # Rounding may make it negative where all of the error lies along D.
        square = self.error / self.delta - (self.cross / self.delta) ** 2
        return math.sqrt(max(0.0, square))

    @property
    def survival(self) -> float | None:
        """1 - |E|^2 / |D|^2; None when the delta is zero."""
        return None if self.delta == 0 else 1 - self.error / self.delta


@dataclass(frozen=True)
class Kept:
    """A layer in one stored form.

    weights: its change in weights. outputs: its change in outputs (None: no inputs are known).
    """

    weights: Change = Change()
    outputs: Change | None = None

    @property
    def survival(self) -> float | None:
        """Survival of outputs; of weights where no inputs are known (experts)."""
        return (self.outputs or self.weights).survival


@dataclass(frozen=True)
class LayerAudit:
    """An adapted layer. weight: |W|^2. delta: |D|^2. kept: stored form -> the layer in it."""

    name: str
    weight: float = 0.0
    delta: float = 0.0
    kept: Mapping[str, Kept] = field(default_factory=dict)

    @property
    def delta_over_weight(self) -> float | None:
        """|D| / |W|; None when the weight is zero."""
        return None if self.weight == 0 else math.sqrt(self.delta / self.weight)


def change_of(delta: npt.NDArray[np.float64], error: npt.NDArray[np.float64]) -> Change:
    """Return the sums over a delta and an error of one shape."""
    return Change(
        float(np.vdot(delta, delta)), float(np.vdot(error, delta)), float(np.vdot(error, error))
    )


def row_parts(rows: int, inputs: int, part_numbers: int = PART_NUMBERS) -> Iterator[range]:
    """Yield the rows of a weight in parts of at most `part_numbers` numbers, at least one row."""
    at_a_time = max(1, part_numbers // max(1, inputs))
    for first in range(0, rows, at_a_time):
        yield range(first, min(rows, first + at_a_time))


def audit_layer(
    name: str,
    shape: tuple[int, int],
    base: Rows,
    tuned: Rows,
    stored: Mapping[str, Rows],
    inputs: Floats | None,
    part_numbers: int = PART_NUMBERS,
) -> LayerAudit:
    """Return the audit of a layer, reading at most `part_numbers` numbers of each weight at a time.

    shape: (rows, inputs). base, tuned: rows before and after training, in float32. stored: form ->
    rows in that form. inputs: the layer's inputs (N, inputs) (None: not known).
    """
    weight, learned = 0.0, 0.0
    kept = {form: Kept(Change(), None if inputs is None else Change()) for form in stored}
    for part in row_parts(*shape, part_numbers):
        before = base(part.start, part.stop).astype(np.float64)
        after = tuned(part.start, part.stop).astype(np.float64)
        delta = after - before
        weight += float(np.vdot(before, before))
        learned += float(np.vdot(delta, delta))
        through = None if inputs is None else _outputs(delta, inputs)
        for form, rows in stored.items():
            error = rows(part.start, part.stop).astype(np.float64) - after
            outputs = kept[form].outputs
            if through is not None and inputs is not None and outputs is not None:
                outputs += change_of(through, _outputs(error, inputs))
            kept[form] = Kept(kept[form].weights + change_of(delta, error), outputs)
    return LayerAudit(name, weight, learned, kept)


def _outputs(rows: npt.NDArray[np.float64], inputs: Floats) -> npt.NDArray[np.float64]:
    """Return rows (R, inputs) times inputs (N, inputs), in float32 arithmetic."""
    product: npt.NDArray[np.float64] = (rows.astype(np.float32) @ inputs.T).astype(np.float64)
    return product


@dataclass(frozen=True)
class Divergence:
    """Divergence of two models' next-token distributions.

    nats: mean KL divergence. flips: share of positions where the most probable token differs.
    """

    nats: float
    flips: float


def divergence(reference: Floats, other: Floats) -> Divergence:
    """Compare log-probabilities (positions, vocabulary) of a model with those of the reference."""
    nats = 0.0
    for ours, theirs in zip(reference, other, strict=True):  # a position at a time: no whole copies
        nats += float(np.sum(np.exp(ours) * (ours - theirs), dtype=np.float64))
    flips = float(np.mean(reference.argmax(axis=-1) != other.argmax(axis=-1)))
    return Divergence(max(0.0, nats / len(reference)), flips)


def model_survival(from_base: Divergence, from_stored: Divergence) -> float | None:
    """Return 1 - KL(trained || stored) / KL(trained || base); None when nothing was learned."""
    if from_base.nats < LEAST_DIVERGENCE:
        return None
    return 1 - from_stored.nats / from_base.nats
