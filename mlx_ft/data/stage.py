"""Stage entry: read rows and tokenize them into `data/`; `mlx-ft data show`.

Does not: decide which rows there are (`sources.py`) or what they become (`prepare.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mlx_ft.data import prepare
from mlx_ft.data.replay import with_replay
from mlx_ft.data.rows import FileRows
from mlx_ft.data.show import ShownRow, shown_rows
from mlx_ft.data.sources import read_splits
from mlx_ft.job import Job, renderer, renderer_of
from mlx_ft.model.resolve import resolve_model
from mlx_ft.recipe.schema import Recipe
from mlx_ft.runs.folder import seal, writing_stage
from mlx_ft.system.console import Console


def read_rows(job: Job) -> Mapping[str, FileRows]:
    """Return split name -> its rows, held-out and replayed ones included."""
    return with_replay(read_splits(job.recipe.data), job.recipe, job.model, job.console)


def prepare_data(job: Job, rows: Mapping[str, FileRows]) -> None:
    """Render and count the rows into `data/`."""
    with writing_stage(job.folder, "data") as folder, job.console.progress("rows", 1.0) as line:
        summary = prepare.prepare_data(
            job.recipe.data, renderer(job), folder, job.console, line, rows
        )
        seal(folder, "data", job.inputs["data"], summary.info())


def show_rows(
    recipe: Recipe, console: Console, split: str, count: int, lines: Sequence[int]
) -> Iterator[ShownRow]:
    """Yield rows of a recipe as they would be trained; no run is begun."""
    model = resolve_model(recipe.model, recipe.revision, console)
    yield from shown_rows(recipe.data, renderer_of(recipe, model), split, count, lines)
