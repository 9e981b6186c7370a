"""Sizes that batches are padded to on a GPU, so that few shapes are compiled.

A compiled step serves one set of shapes. Rows come in ever new lengths.
"""

from __future__ import annotations

# Tokens of a batch: sixteen sizes an octave waste 3 % at most above 512, and 2 % on average.
TOKEN_STEPS = 16
# Trained tokens and the longest row: they cost the head, and attention, alone.
OTHER_STEPS = 8
# A tile of Metal's matrix products.
SMALLEST = 32


def bucket(size: int, steps: int) -> int:
    """Return the next size, of `steps` an octave, that is not smaller; a multiple of SMALLEST."""
    octave = 1 << max(0, size - 1).bit_length() - 1 if size > 1 else 1
    step = max(SMALLEST, octave // steps)
    return max(1, -(-size // step)) * step
