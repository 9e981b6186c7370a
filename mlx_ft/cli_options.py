"""Options that several verbs of the command line have, declared once, and a command written out.

Does not: do anything.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

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
