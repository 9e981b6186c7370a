"""Render checked rows to token ids and loss masks.

Does: collect rows that cannot be trained honestly, and set aside rows that are too long.
Does not: cut a row, call a chat template (`model/chat.py` does), or write files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_ft.data.loss_weights import token_weights, weighs_anything
from mlx_ft.data.problems import Problem
from mlx_ft.data.rows import Row
from mlx_ft.data.tokens import Flags, Ids, TokenizedSplit, Weights, pack_rows
from mlx_ft.model.chat import ChatRenderer, RenderedRow, RowRefused
from mlx_ft.recipe.schema import DataRecipe
from mlx_ft.system.console import Progress

# Tokenized together, so that the tokenizer can use all cores.
ROWS_AT_A_TIME = 512


@dataclass(frozen=True)
class RenderedSplit:
    """A split's kept rows, tokenized, and the others.

    kept: the source rows of `tokens`, in the same order.
    all_lengths: tokens of every row that could be rendered, overlong ones included.
    overlong_lines: lines of rows that are too long.
    toolless_lines: kept rows whose tools the chat template does not show to the model.
    problems: rows that the renderer or the recipe refuses.
    """

    tokens: TokenizedSplit
    kept: tuple[Row, ...]
    all_lengths: tuple[int, ...]
    overlong_lines: tuple[int, ...]
    toolless_lines: tuple[int, ...]
    problems: tuple[Problem, ...]


def render_split(
    path: Path,
    rows: Sequence[Row],
    renderer: ChatRenderer,
    data: DataRecipe,
    progress: Progress | None = None,
) -> RenderedSplit:
    """Render the rows of one file.

    progress: shown before each row; its total is the number of rows.

    A row is never cut. One longer than `data.max_seq_length` tokens is left out, or is a problem
    when `data.overlong` is refuse.
    """
    kept: list[Row] = []
    arrays: list[tuple[Ids, Flags]] = []
    weights: list[Weights] = []
    weighted = weighs_anything(data)
    lengths: list[int] = []
    overlong: list[int] = []
    toolless: list[int] = []
    problems: list[Problem] = []
    for done, (row, rendered) in enumerate(_rendered_rows(rows, renderer, data.mask_prompt)):
        if progress is not None:
            progress.update(done)
        try:
            ids, trained = _checked(row, rendered, renderer)
            if weighted:
                weight = token_weights(row, renderer, data, len(ids))
        except RowRefused as error:
            fix = "correct or remove the row"
            problems.append(Problem(path, row.line, "refused by the renderer", str(error), fix))
            continue
        lengths.append(len(ids))
        if len(ids) <= data.max_seq_length:
            kept.append(row)
            arrays.append((ids, trained))
            if weighted:
                weights.append(weight)
            if _loses_tools(row, renderer, ids):
                toolless.append(row.line)
            continue
        overlong.append(row.line)
        if data.overlong == "refuse":
            found = f"{len(ids):,} tokens, longer than max_seq_length {data.max_seq_length:,}"
            fix = "shorten it, raise data.max_seq_length, or set data.overlong to drop"
            problems.append(Problem(path, row.line, "too long", found, fix))
    return RenderedSplit(
        tokens=pack_rows(arrays, [row.line for row in kept], weights),
        kept=tuple(kept),
        all_lengths=tuple(lengths),
        overlong_lines=tuple(overlong),
        toolless_lines=tuple(toolless),
        problems=tuple(problems),
    )


def _rendered_rows(
    rows: Sequence[Row], renderer: ChatRenderer, mask_prompt: bool
) -> Iterator[tuple[Row, RenderedRow | RowRefused]]:
    """Yield each row with its ids or why it is refused; many go to the tokenizer together."""
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        part = rows[start : start + ROWS_AT_A_TIME]
        talks = [(row.messages, row.tools) for row in part if row.messages is not None]
        rendered = iter(renderer.training_rows(talks, mask_prompt=mask_prompt))
        for row in part:
            yield row, next(rendered) if row.text is None else _plain_text(row.text, renderer)


def _plain_text(text: str, renderer: ChatRenderer) -> RenderedRow | RowRefused:
    try:
        return renderer.text_row(text)
    except RowRefused as refused:
        return refused


def _checked(
    row: Row, rendered: RenderedRow | RowRefused, renderer: ChatRenderer
) -> tuple[Ids, Flags]:
    """Return one row's ids and trained flags; RowRefused when nothing of it would be trained."""
    if isinstance(rendered, RowRefused):
        raise rendered
    ids = np.array(rendered.ids, dtype=np.int32)
    trained = np.array(rendered.trained, dtype=np.uint8)
    _refuse_lost_calls(row, renderer, ids[trained != 0])
    # Nothing predicts a row's first token, so it cannot be a target whatever the mask says.
    trained[:1] = 0
    if not trained.any():
        raise RowRefused("no token of it would be trained")
    return ids, trained


def _refuse_lost_calls(row: Row, renderer: ChatRenderer, trained_ids: Ids) -> None:
    """Raise RowRefused when a tool call is missing from the trained text.

    A chat template that knows nothing of tool calls renders them as an empty answer, silently.
    """
    calls = [call for message in row.messages or () for call in message.get("tool_calls", ())]
    if not calls:
        return
    text = renderer.decode_raw(trained_ids.tolist())
    for call in calls:
        name = call.get("function", call)["name"]
        if name not in text:
            raise RowRefused(f"the chat template leaves out the tool call to {name}")


def _loses_tools(row: Row, renderer: ChatRenderer, ids: Ids) -> bool:
    """Return whether a row names tools and the chat template shows none of them to the model."""
    functions = [tool.get("function", tool) for tool in row.tools or ()]
    names = [function.get("name") for function in functions if isinstance(function, Mapping)]
    known = [name for name in names if isinstance(name, str) and name]
    if not known:
        return False
    text = renderer.decode_raw(ids.tolist())
    return not any(name in text for name in known)
