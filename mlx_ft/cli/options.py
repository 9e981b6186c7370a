"""Options that several verbs of the command line have, declared once, and a command written out.

Does not: do anything.
"""

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
    from mlx_ft.system.console import Console


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
RECIPE = click.argument("recipe", type=click.Path(path_type=Path))


def opened_recipe(recipe: Path, sets: tuple[str, ...], runs_root: Path, fit: bool) -> OpenRun:
    """Open a recipe, changed so that it fits into this machine's memory if that is wanted."""
    if not fit:
        return open_recipe(recipe, sets, runs_root)
    from mlx_ft.pipeline import fitted

    return fitted(lambda more: open_recipe(recipe, (*sets, *more), runs_root))


def advanced(
    recipe: Path, sets: tuple[str, ...], runs_root: Path, until: str, fit: bool = False
) -> Job:
    run = opened_recipe(recipe, sets, runs_root, fit)
    from mlx_ft.pipeline import run_pipeline  # heavy; a recipe that is refused does not need it

    run_pipeline(run, until)
    return run.job


DEFAULT_RUNS = Path("runs")
RUNS = click.option(
    "--runs",
    "runs_root",
    type=click.Path(path_type=Path),
    default=DEFAULT_RUNS,
    show_default=True,
    help="Folder that holds the run folders.",
)


def command_line(verb: str, operands: Sequence[object], options: Mapping[str, object]) -> str:
    """Return an mlx-ft command as a shell reads it.

    Of `options` (`--name` -> value), True is a flag, a tuple is one option for each of its values,
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
    """Return --runs for `command_line`, empty where it is the default."""
    return {} if runs_root == DEFAULT_RUNS else {"--runs": runs_root}


def recipe_command(
    verb: str, recipe: Path, sets: tuple[str, ...], runs_root: Path, fit: bool = False
) -> str:
    """Return the command that does `verb` with the same recipe, changed and kept as it is now."""
    options = {"--set": sets, **runs_option(runs_root), "--fit": fit}
    return command_line(verb, [recipe], options)


RUN = click.argument("run", type=click.Path(path_type=Path))
COLUMN = click.option(
    "--column",
    type=click.Choice(COLUMNS),
    default=DEFAULT_COLUMN,
    show_default=True,
    help="Which model of the run.",
)


def console_for_people() -> Console:
    """Return the console that narration goes to."""
    from mlx_ft.system.console import Console

    return Console()


def open_recipe(recipe: Path, sets: tuple[str, ...], runs_root: Path) -> OpenRun:
    """Load a recipe (or the one inside a run folder) and find its run."""
    from mlx_ft.recipe.load import load_recipe

    if recipe.is_dir() and (recipe / "recipe.yaml").exists():
        runs_root, recipe = recipe.resolve().parent, recipe / "recipe.yaml"
    loaded = load_recipe(recipe, sets)
    from mlx_ft.inputs import open_run

    console = console_for_people()
    for note in loaded.notes:
        console.say(note)
    return open_run(loaded, runs_root, console)


def show_result(run: Path) -> None:
    """Print a run's result."""
    from mlx_ft.report.terminal import result_lines
    from mlx_ft.runs.document import run_document

    click.echo(result_lines(run_document(run), run), nl=False)
