"""How much of what training learned is left: sums over the rows of a layer, and what they say.

Does: add up, in float64 and a few rows at a time, how far a layer is from what training made of it;
compare next-token distributions. Does not: read files, run models, or decide whether it is enough.

Definitions. W is a weight before training, D what training adds to it, E what is amiss afterwards:
the weight as stored - (W + D). What changed altogether is C = D + E.

- gain = <C, D> / <D, D>: the share of D that is there. 1: all of it, 0: none, whatever the noise.
- noise = |C - gain D| / |D|: what is there besides, as large as D at 1.
- survival = 1 - |E|^2 / |D|^2: 1 - (1 - gain)^2 - noise^2, so both count. 0 where D is gone, and
  where noise is as large as it; negative where training is buried.
- of outputs: the same with D x, E x and W x in place of D, E and W, over inputs x that were not
  trained or calibrated on. GPTQ makes errors of weights cancel out there, and D, which is made for
  inputs like these, is large there.
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
# (first row, end row) of a weight, experts one below the other -> these rows (rows, inputs)
Rows = Callable[[int, int], Floats]
# Numbers of a weight that are looked at together; in float64 they are 16 MiB.
PART_NUMBERS = 1 << 21
# Below this, in nats, nothing was learned that could survive.
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
        """Share of what was learned that is there; None when nothing was learned."""
        return None if self.delta == 0 else 1 + self.cross / self.delta

    @property
    def noise(self) -> float | None:
        """What is there besides, in sizes of what was learned."""
        if self.delta == 0:
            return None
        # The difference of two equal numbers where all of the error lies along D.
        square = self.error / self.delta - (self.cross / self.delta) ** 2
        return math.sqrt(max(0.0, square))

    @property
    def survival(self) -> float | None:
        """1 - |E|^2 / |D|^2."""
        return None if self.delta == 0 else 1 - self.error / self.delta


@dataclass(frozen=True)
class Kept:
    """A layer as it is stored in one way: its change in weights, and in outputs if inputs are
    known.
    """

    weights: Change = Change()
    outputs: Change | None = None

    @property
    def survival(self) -> float | None:
        """The survival of outputs; of weights where no inputs are known (experts)."""
        return (self.outputs or self.weights).survival


@dataclass(frozen=True)
class LayerAudit:
    """An adapted layer: |W|^2, |D|^2, and what each way of storing it keeps, by the way's name."""

    name: str
    weight: float = 0.0
    delta: float = 0.0
    kept: Mapping[str, Kept] = field(default_factory=dict)

    @property
    def delta_over_weight(self) -> float | None:
        return None if self.weight == 0 else math.sqrt(self.delta / self.weight)


def change_of(delta: npt.NDArray[np.float64], error: npt.NDArray[np.float64]) -> Change:
    """Return the sums of two arrays of one shape."""
    return Change(
        float(np.vdot(delta, delta)), float(np.vdot(error, delta)), float(np.vdot(error, error))
    )


def row_parts(rows: int, inputs: int, part_numbers: int = PART_NUMBERS) -> Iterator[range]:
    """Cut the rows of a weight into parts of at most `part_numbers` numbers, one row at least."""
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
    """Return what each of the `stored` ways keeps of a layer of `shape` (rows, inputs).

    `base` and `tuned` give rows before and after training in float32; `inputs` (N, inputs) is what
    goes into the layer. No more than `part_numbers` numbers of each are held at a time.
    """
    weight, learned = 0.0, 0.0
    kept = {way: Kept(Change(), None if inputs is None else Change()) for way in stored}
    for part in row_parts(*shape, part_numbers):
        before = base(part.start, part.stop).astype(np.float64)
        after = tuned(part.start, part.stop).astype(np.float64)
        delta = after - before
        weight += float(np.vdot(before, before))
        learned += float(np.vdot(delta, delta))
        through = None if inputs is None else _outputs(delta, inputs)
        for way, rows in stored.items():
            error = rows(part.start, part.stop).astype(np.float64) - after
            outputs = kept[way].outputs
            if through is not None and inputs is not None and outputs is not None:
                outputs += change_of(through, _outputs(error, inputs))
            kept[way] = Kept(kept[way].weights + change_of(delta, error), outputs)
    return LayerAudit(name, weight, learned, kept)


def _outputs(rows: npt.NDArray[np.float64], inputs: Floats) -> npt.NDArray[np.float64]:
    """Return rows (R, inputs) times inputs (N, inputs), in float32 arithmetic."""
    product: npt.NDArray[np.float64] = (rows.astype(np.float32) @ inputs.T).astype(np.float64)
    return product


@dataclass(frozen=True)
class Divergence:
    """Between two models' next-token distributions: mean KL in nats, share of positions where the
    most probable token is another.
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
