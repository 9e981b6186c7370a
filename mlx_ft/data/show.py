"""Rows as the model sees them, with the trained text marked.

Does not: print, or change a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_ft.data.problems import Problem, raise_problems
from mlx_ft.data.render import RenderedSplit, render_split
from mlx_ft.data.rows import FileRows
from mlx_ft.data.sources import read_splits
from mlx_ft.data.tokens import Flags, Ids
from mlx_ft.errors import DataError, Fault
from mlx_ft.model.chat import ChatRenderer
from mlx_ft.recipe.schema import DataRecipe
from mlx_ft.text.safe import printable

GREEN, PLAIN = "\x1b[1;32m", "\x1b[0m"
GUILLEMETS = ("\u00ab", "\u00bb")


@dataclass(frozen=True)
class ShownRow:
    """One row as the model sees it.

    pieces: (text, whether it is trained), in order.
    """

    line: int
    tokens: int
    trained_tokens: int
    pieces: tuple[tuple[str, bool], ...]


def shown_rows(
    data: DataRecipe, renderer: ChatRenderer, split: str, count: int, lines: Sequence[int] = ()
) -> Iterator[ShownRow]:
    """Yield the first `count` rows of a split that are trained, or those of the given lines.

    Raises DataError with all that is wrong with the split, and for lines that cannot be shown.
    """
    read = read_splits(data)
    raise_problems(read[split].problems)
    if lines:
        yield from _shown(_of_lines(read, split, set(lines), renderer, data), renderer)
        return
    file, left = read[split], count
    for row in file.rows:
        rendered = render_split(file.path, [row], renderer, data)
        raise_problems(rendered.problems)
        yield from _shown(rendered, renderer)
        left -= len(rendered.kept)
        if not left:
            return
    if left == count:
        found = f"all {len(file.rows):,} rows are longer than max_seq_length"
        fix = "raise data.max_seq_length"
        if not file.rows:
            found, fix = "there is no row on this side", "change data.holdout or its seed"
        raise DataError(Fault(str(file.path), found, fix))


def _of_lines(
    read: Mapping[str, FileRows],
    split: str,
    lines: set[int],
    renderer: ChatRenderer,
    data: DataRecipe,
) -> RenderedSplit:
    """Return the rows of these lines; DataError with every line that has none to show."""
    file = read[split]
    rows = [row for row in file.rows if row.line in lines]
    rendered = render_split(file.path, rows, renderer, data)
    missing = lines - {row.line for row in rows}
    problems = [_not_there(read, split, line) for line in sorted(missing)]
    problems += rendered.problems
    if data.overlong == "drop":
        problems += [_too_long(file.path, line, data) for line in rendered.overlong_lines]
    raise_problems(problems)
    return rendered


def _not_there(read: Mapping[str, FileRows], split: str, line: int) -> Problem:
    file = read[split]
    for other, rows in read.items():
        if rows.path == file.path and any(row.line == line for row in rows.rows):
            held = "held out" if other == "valid" else "trained"
            found = f"the row is {held}, it is in the other split"
            return Problem(file.path, line, "no such row", found, f"add --split {other}")
    last = max((row.line for row in file.rows), default=0)
    fix = f"name the line of a row; the last row is in line {last:,}"
    return Problem(file.path, line, "no such row", "there is no row in this line", fix)


def _too_long(path: Path, line: int, data: DataRecipe) -> Problem:
    found = f"the row is longer than max_seq_length ({data.max_seq_length:,}) and left out"
    return Problem(path, line, "too long", found, "raise data.max_seq_length, or shorten the row")


def _shown(rendered: RenderedSplit, renderer: ChatRenderer) -> Iterator[ShownRow]:
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
    """Return a line about the row, then its text as the model sees it.

    Trained pieces are green or, without colour, between guillemets.
    """
    begin, end = (GREEN, PLAIN) if in_color else GUILLEMETS
    pieces = (
        f"{begin}{printable(text)}{end}" if trained else printable(text)
        for text, trained in row.pieces
    )
    about = f"line {row.line}: {row.tokens:,} tokens, {row.trained_tokens:,} of them trained"
    return f"{about}\n{''.join(pieces)}\n"
