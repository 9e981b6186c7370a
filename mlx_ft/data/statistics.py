"""Lengths, coverage, overlap, turns and categories of a rendered split, as plain JSON.

Does not: judge the numbers (`preflight/`) or draw them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from mlx_ft.data.render import RenderedSplit
from mlx_ft.data.rows import Row, thinks
from mlx_ft.data.tokens import TokenizedSplit

ROUND_LENGTHS = (256, 512, 1024, 2048, 4096)
HISTOGRAM_BINS = 20
QUANTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}
LISTED_OVERLAPS = 20
NO_CATEGORY = "(none)"
Name = TypeVar("Name", str, int)


def split_statistics(split: RenderedSplit, stop_ids: Collection[int]) -> dict[str, Any]:
    """Return the statistics of one split.

    Lengths are in tokens. `length_quantiles` and `histogram` describe all rows, the overlong ones
    included, since they are for choosing `max_seq_length`; everything else describes the kept rows.
    `turns` are the assistant's, over all rows; `rows_by_turns` counts rows by their number.
    """
    tokens, kept = split.tokens, split.kept
    turns = [_assistant_turns(row) for row in kept]
    total, trained = len(tokens.ids), int(tokens.trained.sum())
    return {
        "rows": len(tokens),
        "dropped_overlong": len(split.overlong_lines),
        "forms": _counts(row.form for row in kept),
        "tokens": total,
        "trained_tokens": trained,
        "trained_share": trained / total if total else 0.0,
        "longest_kept": max(tokens.lengths.tolist(), default=0),
        "length_quantiles": length_quantiles(split.all_lengths),
        "histogram": length_histogram(split.all_lengths),
        "turns": sum(turns),
        "rows_by_turns": {str(count): rows for count, rows in _counts(turns).items()},
        "categories": _categories(kept),
        "stop_trained_rows": _rows_that_train(tokens, stop_ids),
        "toolless_rows": len(split.toolless_lines),
        "thinking_rows": sum(map(thinks, kept)),
    }


def length_quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Return p5, p50, p95 and max of row lengths; each is the length of some row (0 for none)."""
    if not lengths:
        return dict.fromkeys(QUANTILES, 0)
    return {
        name: int(np.quantile(lengths, share, method="inverted_cdf"))
        for name, share in QUANTILES.items()
    }


def length_histogram(lengths: Sequence[int]) -> dict[str, list[int]]:
    """Return at most twenty bins of equal width; edges are tokens, one more than counts.

    Bin i holds lengths from edges[i] up to, not including, edges[i + 1]; the last includes both.
    """
    longest = max(lengths, default=0)
    edges = np.unique(np.linspace(0, max(longest, 1), HISTOGRAM_BINS + 1).round().astype(int))
    counts, _ = np.histogram(lengths, bins=edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def coverage(lengths: Sequence[int], max_seq_length: int) -> dict[str, float]:
    """Return the share of rows that fit into the chosen length and into round ones.

    Keys are the lengths in tokens, as text and ascending; `lengths` must be those of all rows,
    before any was left out.
    """
    chosen = sorted({*ROUND_LENGTHS, max_seq_length})
    values = np.array(lengths)
    return {str(limit): float((values <= limit).mean()) if lengths else 0.0 for limit in chosen}


def overlap(train: TokenizedSplit, valid: TokenizedSplit) -> dict[str, Any]:
    """Return how many validation rows are, token for token, training rows too.

    `overlap_lines` are the first twenty as [line in train, line in valid].
    """
    train_lines: dict[bytes, int] = {}
    for index in range(len(train)):
        train_lines.setdefault(train.row(index)[0].tobytes(), int(train.lines[index]))
    pairs = []
    for index in range(len(valid)):
        line = train_lines.get(valid.row(index)[0].tobytes())
        if line is not None:
            pairs.append([line, int(valid.lines[index])])
    return {"overlap_rows": len(pairs), "overlap_lines": pairs[:LISTED_OVERLAPS]}


def _counts(names: Iterable[Name]) -> dict[Name, int]:
    return dict(sorted(Counter(names).items()))


def _categories(rows: Sequence[Row]) -> dict[str, int]:
    """Return rows by category, or nothing when no row has one."""
    if all(row.category is None for row in rows):
        return {}
    return _counts(NO_CATEGORY if row.category is None else row.category for row in rows)


def _assistant_turns(row: Row) -> int:
    return sum(message["role"] == "assistant" for message in row.messages or ())


def _rows_that_train(tokens: TokenizedSplit, wanted: Collection[int]) -> int:
    """Return how many rows train at least one of the wanted ids."""
    hits = np.isin(tokens.ids, list(wanted)) & (tokens.trained != 0)
    totals = np.concatenate([[0], np.cumsum(hits)])
    return int((np.diff(totals[tokens.offsets]) > 0).sum())
