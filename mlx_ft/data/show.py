"""What is learned from a row: its text as the model sees it, and which of it is trained.

Does: render rows and cut them where training begins and ends. Does not: print, or change a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_ft.chat import ChatRenderer
from mlx_ft.console import printable
from mlx_ft.data.problems import raise_problems
from mlx_ft.data.render import render_split
from mlx_ft.data.sources import read_splits
from mlx_ft.recipe import DataRecipe
from mlx_ft.tokens import Flags, Ids

GREEN, PLAIN = "\x1b[1;32m", "\x1b[0m"
GUILLEMETS = ("\u00ab", "\u00bb")


@dataclass(frozen=True)
class ShownRow:
    """One row of `line`: its text in `pieces` of (text, whether it is trained)."""

    line: int
    tokens: int
    trained_tokens: int
    pieces: tuple[tuple[str, bool], ...]


def shown_rows(
    data: DataRecipe, renderer: ChatRenderer, split: str, count: int, lines: Sequence[int] = ()
) -> Iterator[ShownRow]:
    """Yield the first `count` rows of a split, or those of the given lines, as they are trained.

    Raises DataError with all that is wrong with the split.
    """
    file = read_splits(data)[split]
    raise_problems(file.problems)
    wanted = [row for row in file.rows if not lines or row.line in lines]
    rendered = render_split(file.path, wanted if lines else wanted[:count], renderer, data)
    raise_problems(rendered.problems)
    for index, row in enumerate(rendered.kept):
        ids, trained = rendered.tokens.row(index)
        pieces = tuple(_pieces(ids, trained, renderer))
        yield ShownRow(row.line, len(ids), int(trained.sum()), pieces)


def _pieces(ids: Ids, trained: Flags, renderer: ChatRenderer) -> Iterator[tuple[str, bool]]:
    begin = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[begin]:
            yield renderer.decode_raw(ids[begin:end].tolist()), bool(trained[begin])
            begin = end


def row_text(row: ShownRow, in_color: bool) -> str:
    """Return a line about the row, then what the model sees of it, trained pieces green or, without
    colour, between guillemets.
    """
    begin, end = (GREEN, PLAIN) if in_color else GUILLEMETS
    pieces = (
        f"{begin}{printable(text)}{end}" if trained else printable(text)
        for text, trained in row.pieces
    )
    about = f"line {row.line}: {row.tokens:,} tokens, {row.trained_tokens:,} of them trained"
    return f"{about}\n{''.join(pieces)}\n"
