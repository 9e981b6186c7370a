"""MinHash near-duplicate search over texts.

Does: find, for each text, the first earlier one that shares most of its runs of five words.
Does not: decide about duplicates.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

SHINGLE_WORDS = 5
# Rows that share such a part of their word runs are near duplicates (Jaccard similarity; Lee et
# al., arXiv 2107.06499, appendix A, use 0.8 as well).
NEAR_DUPLICATE = 0.8
# A pair of similarity 0.8 shares a band with probability 1 - (1 - 0.8 ** 4) ** 12 = 0.998.
SKETCH_BANDS, SKETCH_ROWS = 12, 4
# Rows of one template share a band with thousands of others. A band that so many have tells the
# template and no more: further rows are not filed under it. And so many candidates are compared.
MOST_FILED, MOST_COMPARED = 256, 32
# Odd, so that multiplying by one permutes the numbers of 64 bits.
MULTIPLIERS = np.random.default_rng(0).integers(
    1 << 62, 1 << 63, SKETCH_BANDS * SKETCH_ROWS, dtype=np.uint64
) | np.uint64(1)
Shingles = npt.NDArray[np.uint64]


def words_of(text: str) -> list[str]:
    """Return a text's words, small, without anything between them."""
    return re.findall(r"\w+", text.lower())


def word_runs(words: Sequence[str], count: int) -> Iterator[str]:
    """Yield every run of `count` words."""
    for start in range(len(words) - count + 1):
        yield " ".join(words[start : start + count])


def shingles_of(text: str) -> Shingles:
    """Return checksums of the text's word runs, each once, in order."""
    words = [zlib.crc32(word.encode()) for word in words_of(text)]
    runs = len(words) - SHINGLE_WORDS + 1
    if runs <= 0:
        return np.empty(0, np.uint64)
    sums = np.array(words, dtype=np.uint64)
    with np.errstate(over="ignore"):  # modulo 2 ** 64 is what is wanted
        # The places of words within a run differ by their multipliers.
        of_runs = sum(
            sums[place : place + runs] * MULTIPLIERS[place] for place in range(SHINGLE_WORDS)
        )
        mixed = (of_runs ^ (of_runs >> np.uint64(29))) * MULTIPLIERS[SHINGLE_WORDS]
    return np.unique(mixed)


def bands_of(shingles: Shingles) -> list[bytes]:
    """Return the bands of the MinHash sketch (Broder 1997), each with its number."""
    with np.errstate(over="ignore"):  # modulo 2 ** 64 is what is wanted
        sketch = (shingles[:, None] * MULTIPLIERS[None, :]).min(axis=0)
    bands = sketch.reshape(SKETCH_BANDS, SKETCH_ROWS)
    return [bytes([number]) + band.tobytes() for number, band in enumerate(bands)]


def similarity(one: Shingles, other: Shingles) -> float:
    """Return the Jaccard similarity of two sets of checksums; 0 when both are empty."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / max(1, len(one) + len(other) - common)


def earlier_twins(texts: Sequence[str], contexts: Sequence[str]) -> list[int | None]:
    """Return, for each text, the index of the first earlier one that it nearly equals, or None.

    Twins stand in contexts that are equal or nearly so. Texts of fewer than five words nearly equal
    nothing. The first of a family stands for it: later
    ones are compared with it alone, so that chains do not grow. Of many that may be near, the 32
    that share most bands are compared, and a band is looked up among its first 256 texts: among
    thousands of one template, one that is hardly near enough can be missed.
    """
    context_of = {context: shingles_of(context) for context in set(contexts)}

    def is_twin(one: int, other: int) -> bool:
        if similarity(shingles[one], shingles[other]) < NEAR_DUPLICATE:
            return False
        here, there = contexts[one], contexts[other]
        return here == there or similarity(context_of[here], context_of[there]) >= NEAR_DUPLICATE

    buckets: dict[bytes, list[int]] = defaultdict(list)
    shingles: list[Shingles] = []
    twins: list[int | None] = []
    for index, text in enumerate(texts):
        mine = shingles_of(text)
        shingles.append(mine)
        twins.append(None)
        if not len(mine):
            continue
        bands = bands_of(mine)
        shared = Counter[int]()
        for band in bands:
            shared.update(buckets[band])
        near = sorted(other for other, _ in shared.most_common(MOST_COMPARED))
        twin = next((other for other in near if is_twin(index, other)), None)
        twins[index] = twin
        if twin is None:
            for band in bands:
                if len(buckets[band]) < MOST_FILED:
                    buckets[band].append(index)
    return twins
