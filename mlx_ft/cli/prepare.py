"""Verbs before a training: check, rehearse, fit, probe, data show, recipe upgrade. No logic."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mlx_ft.cli.options import (
    DEFAULT_RUNS,
    FIT,
    RECIPE,
    RUNS,
    SETS,
    console_for_people,
    open_recipe,
    recipe_command,
    run_until,
)


@click.command()
@RECIPE
@SETS
@RUNS
@FIT
def check(recipe: Path, sets: tuple[str, ...], runs_root: Path, fit: bool) -> None:
    """Check a recipe, its data, its model and this machine; nothing is trained."""
    job = run_until("preflight", recipe, sets, runs_root, fit)
    click.echo(f"{recipe}: nothing stops it")
    click.echo(f"next     {recipe_command('run', recipe, sets, runs_root, fit)}")
    click.echo(f"run      {job.folder}")


@click.command()
@RECIPE
@SETS
@RUNS
@click.option(
    "--miniature", is_flag=True, help="With a random two-layer model of the same kind: in seconds."
)
def rehearse(recipe: Path, sets: tuple[str, ...], runs_root: Path, miniature: bool) -> None:
    """Check, then go through every stage with a few rows and steps.

    So that a long run does not fail at its last stage. Nothing of it is kept.
    """
    from mlx_ft.rehearse import rehearse as rehearse_stages
    from mlx_ft.text.quantities import format_seconds

    seconds = rehearse_stages(
        lambda more: open_recipe(recipe, (*sets, *more), runs_root), miniature
    )
    click.echo(f"{recipe}: every stage went through, in {format_seconds(seconds)}")
    click.echo(f"next     {recipe_command('run', recipe, sets, runs_root)}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON document.")
def doctor(as_json: bool) -> None:
    """Check this machine: device, memory, versions, what MLX computes, and how fast.

    Takes about a minute. The outcome is kept, and is in the record of each later run.
    """
    from mlx_ft.doctor.checks import worst
    from mlx_ft.doctor.examine import as_json as json_of
    from mlx_ft.doctor.examine import examine, lines

    with console_for_people().progress("doctor", 1.0) as progress:
        checks = examine(progress)
    click.echo(json_of(checks) if as_json else "\n".join(lines(checks)))
    if worst(checks) == "fail":
        sys.exit(1)


@click.command()
@click.option("--memory", help="Memory of the Mac, such as 16GB; this machine's when left out.")
@click.option(
    "--tokens", type=click.IntRange(8), default=1024, show_default=True, help="Longest row."
)
@click.option(
    "--bits",
    type=click.Choice(["4", "8", "16"]),
    default="4",
    show_default=True,
    help="Of the base.",
)
def fit(memory: str | None, tokens: int, bits: str) -> None:
    """Print which models a Mac of so much memory can train, and with which settings."""
    from mlx_ft.preflight.fit import fit_lines
    from mlx_ft.system.hardware import machine
    from mlx_ft.text.quantities import bytes_from_text

    memory_bytes = bytes_from_text(memory) if memory else machine().memory_bytes
    for line in fit_lines(memory_bytes, tokens, int(bits)):
        click.echo(line)
    click.echo("next     write a recipe, then mlx-ft check RECIPE --fit")


@click.command()
@click.argument("model")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--enable-thinking", is_flag=True, help="Ask in thinking mode.")
@click.option(
    "--suite",
    "suites",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Suite to measure the model with as well; may be repeated.",
)
def probe(
    model: str, revision: str | None, enable_thinking: bool, suites: tuple[Path, ...]
) -> None:
    """Look at a model before training on it: what it is, how it is talked to, what it says.

    A recipe that was tuned for another family of models wants to see that this was done.
    """
    from mlx_ft.evaluate.probe import probe as look

    look(model, revision, enable_thinking, suites, console_for_people())
    click.echo(f"next     write a recipe with model: {model}, then mlx-ft check RECIPE")


@click.group("data")
def data_group() -> None:
    """Look at a recipe's rows."""


@data_group.command("show")
@RECIPE
@SETS
@click.option("--split", type=click.Choice(["train", "valid"]), default="train", show_default=True)
@click.option("--rows", type=click.IntRange(1), default=3, show_default=True, help="How many.")
@click.option("--line", "lines", type=int, multiple=True, help="This line; may be repeated.")
def data_show(
    recipe: Path, sets: tuple[str, ...], split: str, rows: int, lines: tuple[int, ...]
) -> None:
    """Print rows as the model sees them.

    What is trained is green, or stands between guillemets where there is no colour.
    """
    from mlx_ft.data.show import row_text
    from mlx_ft.data.stage import show_rows
    from mlx_ft.recipe.load import load_recipe
    from mlx_ft.system.console import colored

    loaded, in_color = load_recipe(recipe, sets), colored(sys.stdout)
    for row in show_rows(loaded.recipe, console_for_people(), split, rows, lines):
        click.echo(row_text(row, in_color), color=in_color)
    click.echo(f"next     {recipe_command('check', recipe, sets, DEFAULT_RUNS)}")


@click.group("recipe")
def recipe_group() -> None:
    """Work with recipe files."""


@recipe_group.command()
@click.argument("file", type=click.Path(path_type=Path))
def upgrade(file: Path) -> None:
    """Print an mlx-lm LoRA file as a recipe."""
    from mlx_ft.recipe.load import load_recipe
    from mlx_ft.recipe.write import upgrade_text

    click.echo(upgrade_text(load_recipe(file, ())), nl=False)


VERBS = (doctor, check, rehearse, fit, probe, data_group, recipe_group)
