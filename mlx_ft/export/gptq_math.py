"""GPTQ on one weight: codes that compensate for each other's rounding errors.

Does: order the inputs, compute the correction of later inputs for an error at an earlier one,
quantize input by input, pack codes as mlx holds them.
Does not: know models, or collect inputs (`calibration.py`).

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ", arXiv 2210.17323, sections 3.2 and 3.3. The
order of the inputs is the authors' own later addition (`act_order` of github.com/IST-DASLab/gptq).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import scipy.linalg

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Order = npt.NDArray[np.int64]

# Share of the mean diagonal that is added to the diagonal (0.01 in the paper's section 3.3, step
# 3). More damping keeps abilities that the calibration rows do not show (LOG.md).
DAMPING = 0.04
# Inputs that are corrected one by one before the corrections reach the rest of their group.
BLOCK = 16
# Outputs quantized at a time: they do not depend on each other.
OUTPUT_CHUNK = 1 << 14
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class QuantizationSettings:
    """Format of the quantized layers.

    bits: bits of a weight. group_size: weights that share a scale. dtype: type of scales and
    biases. raised: layer -> bits, of layers with other bits.
    """

    bits: int
    group_size: int
    dtype: mx.Dtype
    raised: Mapping[str, int] = field(default_factory=dict)

    def of(self, layer: str) -> QuantizationSettings:
        """Return the settings of one layer."""
        return QuantizationSettings(self.raised.get(layer, self.bits), self.group_size, self.dtype)


def input_order(products: Floats, group_size: int) -> Order:
    """Return the inputs from the largest to the smallest: group by group, then within each group.

    The error of an early input is corrected by all later ones. Groups stay together because each
    has one scale, which is chosen when its turn comes.
    """
    size = np.diag(products).reshape(-1, group_size)
    groups = np.argsort(-size.sum(axis=1), kind="stable")
    within = np.argsort(-size[groups], axis=1, kind="stable")
    order: Order = (groups[:, None] * group_size + within).reshape(-1)
    return order


def correction_factor(products: Floats, damping: float = DAMPING) -> Floats:
    """Return the upper triangular U (inputs, inputs) with U' U = the inverse of the products.

    Row i of U, over U[i, i], is the correction of the inputs after i for an error at i (section
    3.3). The inverse of a factor R of products = R R', R upper triangular, is such a U. R is the
    Cholesky factor of the products with their order reversed.
    """
    # In its reversed order, and in place from here on: the widest layers' products take gigabytes.
    square = np.array(products[::-1, ::-1], dtype=np.float64, order="F")
    mean = float(np.mean(np.diag(square)))
    # Inputs that are always zero have no products at all; any positive number will do.
    square[np.diag_indices_from(square)] += damping * mean if mean > 0 else 1.0
    factor = scipy.linalg.cholesky(square, lower=True, overwrite_a=True, check_finite=False)
    inverse, info = scipy.linalg.lapack.dtrtri(factor, lower=1, overwrite_c=1)
    assert info == 0, "a Cholesky factor has no zero on its diagonal"
    return np.ascontiguousarray(inverse[::-1, ::-1], dtype=np.float32)


def quantize_inputs(
    weight: Floats, factor: Floats, order: Order, bits: int, group_size: int, dtype: mx.Dtype
) -> tuple[Codes, Floats, Floats]:
    """Return codes (outputs, inputs), scales and biases (outputs, groups) of a weight.

    `factor` belongs to the products in the given `order` of inputs, which keeps groups together.
    Scales and biases are those that mlx chooses for each group when its turn comes, rounded to
    `dtype`, the type they are stored in.
    """
    left = np.asarray(weight.T, dtype=np.float32)[order]  # one input a row: they go in turn
    inputs, outputs = left.shape
    codes = np.empty((inputs, outputs), np.uint8)
    scales = np.empty((inputs // group_size, outputs), np.float32)
    biases = np.empty_like(scales)
    errors = np.empty((group_size, outputs), np.float32)
    for start in range(0, inputs, group_size):
        end, group = start + group_size, int(order[start]) // group_size
        block = left[start:end]
        _, scale, bias = mx.quantize(mx.array(block.T).astype(dtype), group_size, bits)
        scales[group] = np.array(scale.astype(mx.float32))[:, 0]
        biases[group] = np.array(bias.astype(mx.float32))[:, 0]
        step = np.where(scales[group] == 0, 1.0, scales[group]).astype(np.float32)
        for index in range(group_size):
            place = start + index
            code = np.clip(np.rint((block[index] - biases[group]) / step), 0, 2**bits - 1)
            codes[order[place]] = code
            errors[index] = (block[index] - (code * step + biases[group])) / factor[place, place]
            near = min(group_size, (index // BLOCK + 1) * BLOCK)
            block[index + 1 : near] -= np.outer(
                factor[place, place + 1 : start + near], errors[index]
            )
            if index + 1 == near and near < group_size:
                first = start + near - BLOCK
                weights = factor[first : start + near, start + near : end]
                block[near:] -= weights.T @ errors[near - BLOCK : near]
        left[end:] -= factor[start:end, end:].T @ errors
    return codes.T, scales.T, biases.T


def pack_codes(codes: Codes, bits: int) -> mx.array:
    """Return codes (outputs, inputs) as mlx holds them: uint32 (outputs, inputs * bits / 32).

    Each code takes `bits` bits, lowest bit first, directly after the code before it.
    """
    single = np.unpackbits(np.ascontiguousarray(codes)[..., None], axis=-1, bitorder="little")
    stream = single[..., :bits].reshape(codes.shape[0], -1)
    return mx.array(np.packbits(stream, axis=-1, bitorder="little").view(np.uint32))


def packed_rows(
    rows: Callable[[int, int], mx.array],
    outputs: int,
    factor: Floats,
    order: Order,
    settings: QuantizationSettings,
) -> Iterator[tuple[int, mx.array, mx.array, mx.array]]:
    """Yield (first row, packed codes, scales, biases) of a weight, some rows at a time.

    `rows(first, end)` gives rows of the weight.
    """
    at_a_time = max(1, min(OUTPUT_CHUNK, CHUNK_BYTES // (4 * len(order))))
    for start in range(0, outputs, at_a_time):
        weight = np.array(rows(start, min(outputs, start + at_a_time)).astype(mx.float32))
        codes, scales, biases = quantize_inputs(
            weight, factor, order, settings.bits, settings.group_size, settings.dtype
        )
        scale, bias = (mx.array(each).astype(settings.dtype) for each in (scales, biases))
        yield start, pack_codes(codes, settings.bits), scale, bias
