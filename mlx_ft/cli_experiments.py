"""The verbs on many runs at once. No logic.

`cli.py` has the verbs on one recipe, and puts these beside them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mlx_ft.cli_options import RUNS
from mlx_ft.cli_runs import console_for_people, open_job


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--grid",
    "grids",
    multiple=True,
    metavar="KEY=V1,V2",
    help="A value of the recipe and what it is to be; several make all combinations.",
)
@click.option("--random", "count", type=click.IntRange(1), help="So many of them, drawn.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="For the drawing."
)
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value in all of them; may be repeated.",
)
@RUNS
def sweep(
    recipe: Path,
    grids: tuple[str, ...],
    count: int | None,
    seed: int,
    sets: tuple[str, ...],
    runs_root: Path,
) -> None:
    """Run a recipe with every combination of some values, and print a table.

    Each is a run of its own; finished ones are not run again, and token ids and trainings that are
    the same are made once. A gate that stops one does not stop the others.
    """
    from mlx_ft import sweep as sweeping

    console = console_for_people()
    settings = sweeping.grid_settings(grids, count, seed)
    members = sweeping.open_members(
        settings, lambda more: open_job(recipe, (*sets, *more), runs_root)
    )
    stopped = sweeping.run_members(members, console)
    click.echo(sweeping.table_lines(members), nl=False)
    click.echo(f"next     {sweeping.next_step(members)}")
    if stopped:
        sys.exit(stopped[0].exit_code)


VERBS = (sweep,)
