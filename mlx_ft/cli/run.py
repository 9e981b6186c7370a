"""Verbs that do work: run, train, export, eval, sweep. No logic."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_ft.cli.options import (
    FIT,
    RECIPE,
    RUNS,
    SETS,
    console_for_people,
    open_fitted,
    open_recipe,
    recipe_command,
    run_until,
    show_result,
)
from mlx_ft.recipe.cli_defaults import DEFAULT_BATCH_SIZE, DEFAULT_DATE

if TYPE_CHECKING:
    from mlx_ft.evaluate.measure import Wanted


@click.command()
@RECIPE
@SETS
@RUNS
@FIT
def run(recipe: Path, sets: tuple[str, ...], runs_root: Path, fit: bool) -> None:
    """Do the whole job: check, train, export, evaluate, report.

    What is finished already is not done again; what was interrupted goes on.
    """
    show_result(run_until("eval", recipe, sets, runs_root, fit).folder)


@click.command()
@RECIPE
@SETS
@RUNS
@FIT
def train(recipe: Path, sets: tuple[str, ...], runs_root: Path, fit: bool) -> None:
    """Train only, and leave the adapter.

    With an mlx-lm LoRA file, the adapter is left at its adapter_path.
    """
    from mlx_ft.deploy.mlx_lm_adapter import deliver_adapter, require_deliverable

    opened = open_fitted(recipe, sets, runs_root, fit)
    job = opened.job
    target = job.loaded.adapter_path
    if target is not None:
        require_deliverable(target)
    from mlx_ft.pipeline import run_pipeline

    run_pipeline(opened, "train")
    adapter = job.folder / "train" / "adapter"
    if target is not None:
        deliver_adapter(adapter, target)
        adapter = target
    click.echo(f"adapter  {adapter}")
    click.echo(f"next     {recipe_command('run', recipe, sets, runs_root, fit)}")


@click.command()
@RECIPE
@SETS
@RUNS
def export(recipe: Path, sets: tuple[str, ...], runs_root: Path) -> None:
    """Go on as far as the exported models: fused 16-bit and quantized, both verified."""
    job = run_until("export", recipe, sets, runs_root)
    click.echo(f"models   {job.folder / 'export'}")
    click.echo(f"next     {recipe_command('eval', recipe, sets, runs_root)}")


@click.command("eval")
@click.argument("targets", nargs=-1, metavar="[TARGET]...")
@click.option(
    "--suite",
    "suites",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Suite to measure the targets with, without a training; may be repeated.",
)
@click.option(
    "--tasks", metavar="NAME,...", help="Tasks of lm-evaluation-harness; mlx-ft[lm-eval] has it."
)
@click.option(
    "--task-folder",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Folder of further task files for --tasks.",
)
@click.option("--num-fewshot", type=click.IntRange(0), help="Worked examples before each task.")
@click.option("--server", metavar="URL", help="An OpenAI-compatible server too, up to its /v1.")
@click.option("--server-model", metavar="NAME", help="Which of the server's models.")
@click.option(
    "--server-key-env", metavar="VARIABLE", help="Environment variable with the server's key."
)
@click.option("--limit", type=click.IntRange(1), help="Prompts of each suite, from its beginning.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=DEFAULT_BATCH_SIZE,
    show_default=True,
    help="Prompts at a time.",
)
@click.option(
    "--thinking/--no-thinking",
    "enable_thinking",
    default=None,
    help="Ask in this mode; a run's own, or the suites', when left out.",
)
@click.option("--date", default=DEFAULT_DATE, show_default=True, help="What templates call today.")
@click.option(
    "--allow-template-mismatch",
    is_flag=True,
    help="Measure with another chat format than was trained with; the results say so.",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of results.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON document.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Of a recipe: override.")
@RUNS
def evaluate(
    targets: tuple[str, ...],
    suites: tuple[Path, ...],
    tasks: str | None,
    task_folder: Path | None,
    num_fewshot: int | None,
    server: str | None,
    server_model: str | None,
    server_key_env: str | None,
    limit: int | None,
    batch_size: int,
    enable_thinking: bool | None,
    date: str,
    allow_template_mismatch: bool,
    out: Path | None,
    as_json: bool,
    sets: tuple[str, ...],
    runs_root: Path,
) -> None:
    """Measure models: with --suite or --tasks any, side by side; or a recipe's, as it says.

    TARGET is a recipe (alone, without --suite: goes on as far as its evaluation), or any of: a run
    folder or RUN:COLUMN (base, adapter, fused, quantized), a model folder, a Hub id, a built-in
    name.
    """
    if not suites and not tasks:
        _evaluate_recipe(targets, sets, runs_root, server)
        return
    if sets:
        raise click.UsageError("--set is for a recipe; here nothing is trained")
    if (server is None) != (server_model is None):
        raise click.UsageError("--server and --server-model belong together")
    if not targets and server is None:
        raise click.UsageError("name a TARGET or a --server")
    from mlx_ft.evaluate.lm_eval import Tasks
    from mlx_ft.evaluate.measure import ServerAddress, Wanted

    wanted = Wanted(
        targets=targets,
        suites=suites,
        server=(
            ServerAddress(server, server_model, server_key_env) if server and server_model else None
        ),
        tasks=(
            Tasks(tuple(tasks.split(",")), task_folder, num_fewshot, limit, batch_size)
            if tasks
            else None
        ),
        limit=limit,
        batch_size=batch_size,
        enable_thinking=enable_thinking,
        date=date,
        allow_template_mismatch=allow_template_mismatch,
        folder=out,
        runs_root=runs_root,
    )
    _evaluate_models(wanted, as_json)


def _evaluate_recipe(
    targets: tuple[str, ...], sets: tuple[str, ...], runs_root: Path, server: str | None
) -> None:
    if len(targets) != 1 or server is not None:
        raise click.UsageError("name one recipe, or models with --suite or --tasks")
    opened = open_recipe(Path(targets[0]), sets, runs_root)
    from mlx_ft.pipeline import run_pipeline

    run_pipeline(opened, "eval")
    show_result(opened.job.folder)


def _evaluate_models(wanted: Wanted, as_json: bool) -> None:
    from mlx_ft.evaluate.measure import evaluate_targets, evaluation_lines
    from mlx_ft.runs.document import document_json

    results, folder = evaluate_targets(wanted, console_for_people())
    if as_json:
        click.echo(document_json(results))
    else:
        click.echo(evaluation_lines(results, folder), nl=False)


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
        settings, lambda more: open_recipe(recipe, (*sets, *more), runs_root)
    )
    stopped = sweeping.run_members(members, console)
    click.echo(sweeping.table_lines(members), nl=False)
    click.echo(f"next     {sweeping.next_step(members)}")
    if stopped:
        sys.exit(stopped[0].exit_code)


VERBS = (run, train, export, evaluate, sweep)
