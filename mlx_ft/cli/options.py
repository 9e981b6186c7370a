"""Options shared by verbs, commands for the line `next`, and opening of recipes. In this order."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_ft.recipe.names import COLUMNS, DEFAULT_COLUMN

if TYPE_CHECKING:
    from mlx_ft.inputs import OpenRun
    from mlx_ft.job import Job
    from mlx_ft.runs.names import StageName
    from mlx_ft.system.console import Console


RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
SETS = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value of the recipe, such as train.seed=1; may be repeated.",
)
FIT = click.option(
    "--fit",
    is_flag=True,
    help="Change training settings, the cheapest first, until it fits into this machine's memory.",
)
DEFAULT_RUNS = Path("runs")
RUNS = click.option(
    "--runs",
    "runs_root",
    type=click.Path(path_type=Path),
    default=DEFAULT_RUNS,
    show_default=True,
    help="Folder that holds the run folders.",
)
RUN = click.argument("run", type=click.Path(path_type=Path))
COLUMN = click.option(
    "--column",
    type=click.Choice(COLUMNS),
    default=DEFAULT_COLUMN,
    show_default=True,
    help="Which model of the run.",
)


def command_line(verb: str, operands: Sequence[object], options: Mapping[str, object]) -> str:
    """Return an mlx-ft command as a shell reads it.

    options: `--name` -> value. True makes a flag, and a tuple repeats the option for each value.
    None and False are left out.
    """
    named: list[str] = []
    for name, value in options.items():
        if value is True:
            named.append(name)
        elif value is not None and value is not False:
            for each in value if isinstance(value, tuple) else (value,):
                named += [name, str(each)]
    given = [str(operand) for operand in operands]
    dashed = any(operand.startswith("-") for operand in given)
    rest = [*named, "--", *given] if dashed else [*given, *named]
    return shlex.join(["mlx-ft", verb, *rest])


def runs_option(runs_root: Path) -> dict[str, object]:
    """Return --runs for `command_line`; empty for the default folder."""
    return {} if runs_root == DEFAULT_RUNS else {"--runs": runs_root}


def recipe_command(
    verb: str, recipe: Path, sets: tuple[str, ...], runs_root: Path, fit: bool = False
) -> str:
    """Return the command that runs `verb` on the same recipe with the same options."""
    options = {"--set": sets, **runs_option(runs_root), "--fit": fit}
    return command_line(verb, [recipe], options)


def console_for_people() -> Console:
    """Return the console for narration."""
    from mlx_ft.system.console import Console

    return Console()


def open_recipe(recipe: Path, sets: tuple[str, ...], runs_root: Path) -> OpenRun:
    """Load a recipe and find its inputs and its run folder.

    A run folder stands for the recipe.yaml inside it, and for the runs folder that it lies in.
    """
    from mlx_ft.recipe.load import load_recipe

    if recipe.is_dir() and (recipe / "recipe.yaml").exists():
        runs_root, recipe = recipe.resolve().parent, recipe / "recipe.yaml"
    loaded = load_recipe(recipe, sets)
    from mlx_ft.inputs import open_run

    console = console_for_people()
    for note in loaded.notes:
        console.say(note)
    return open_run(loaded, runs_root, console)


def open_fitted(recipe: Path, sets: tuple[str, ...], runs_root: Path, fit: bool) -> OpenRun:
    """Open a recipe as `open_recipe` does.

    fit: also set what its training needs to fit into this machine's memory (runs the data stage).
    """
    if not fit:
        return open_recipe(recipe, sets, runs_root)
    from mlx_ft.pipeline import fitted

    return fitted(lambda more: open_recipe(recipe, (*sets, *more), runs_root))


def run_until(
    stage: StageName, recipe: Path, sets: tuple[str, ...], runs_root: Path, fit: bool = False
) -> Job:
    """Open a recipe, run its pipeline up to and including `stage`, and return its job."""
    run = open_fitted(recipe, sets, runs_root, fit)
    from mlx_ft.pipeline import run_pipeline  # heavy; a recipe that is refused does not need it

    run_pipeline(run, stage)
    return run.job


def show_result(run: Path) -> None:
    """Print a run's result."""
    from mlx_ft.report.terminal import result_lines
    from mlx_ft.runs.document import run_document

    click.echo(result_lines(run_document(run), run), nl=False)
