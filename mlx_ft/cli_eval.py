"""The verb that measures: a recipe's run as far as its evaluation, or any models with any suites.

No logic: arguments in, lines out. `cli.py` puts it beside the other verbs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_ft.cli_options import RUNS
from mlx_ft.cli_runs import console_for_people, open_job, show_result

if TYPE_CHECKING:
    from mlx_ft.evaluation import Wanted

DEFAULT_DATE = "2025-01-01"


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
    "--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Prompts at a time."
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
    from mlx_ft.evaluation import ServerAddress, Wanted
    from mlx_ft.lm_eval_tasks import Tasks

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
    from mlx_ft.pipeline import run_pipeline

    job = open_job(Path(targets[0]), sets, runs_root)
    run_pipeline(job, "eval")
    show_result(job.run)


def _evaluate_models(wanted: Wanted, as_json: bool) -> None:
    from mlx_ft.evaluation import evaluate_targets, evaluation_lines
    from mlx_ft.runs.document import document_json

    results, folder = evaluate_targets(wanted, console_for_people())
    if as_json:
        click.echo(document_json(results))
    else:
        click.echo(evaluation_lines(results, folder), nl=False)
