"""The verbs on many runs: list them, compare them, watch one, clean up after them. No logic.

`cli.py` has the verbs on recipes, `cli_runs.py` those on one run that is there.
"""

from __future__ import annotations

from pathlib import Path

import click

FORMATS = ("text", "markdown", "csv", "json", "html")
STATES = (
    "running",
    "dead",
    "interrupted",
    "stopped",
    "finished",
    "gate_failed",
    "failed",
    "unknown",
)
RUNS = click.option(
    "--runs",
    "runs_root",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder that holds the run folders.",
)


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="text, if not given, or what the ending of --output says.",
)
@click.option("--output", type=click.Path(path_type=Path), help="File to write instead.")
def compare(runs: tuple[Path, ...], form: str | None, output: Path | None) -> None:
    """Set runs beside each other: what was changed, losses, scores, time, memory.

    The first run is the baseline. Scores are judged prompt by prompt.
    """
    from mlx_ft.comparing import compare as compare_runs
    from mlx_ft.comparing import form_of, write_comparison

    comparison = compare_runs(runs)
    text = form_of(form, output)(comparison)
    if output is None:
        click.echo(text, nl=False)
        if form in (None, "text"):
            click.echo(f"next     mlx-ft show {runs[0]}")
        return
    write_comparison(output, text)
    click.echo(output)


@click.command("runs")
@RUNS
@click.option("--status", "states", type=click.Choice(STATES), multiple=True, help="Only these.")
@click.option("--name", "names", multiple=True, help="Part of a name, or a pattern such as exp-*.")
@click.option("--newest", type=click.IntRange(1), help="So many, the newest.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON document.")
def list_runs(
    runs_root: Path,
    states: tuple[str, ...],
    names: tuple[str, ...],
    newest: int | None,
    as_json: bool,
) -> None:
    """List runs, the newest first: state, when, loss, scores, disk."""
    from mlx_ft.report.run_table import next_line, runs_json, runs_text
    from mlx_ft.run_list import list_runs as entries_of

    entries = entries_of(runs_root, states, names, newest)
    if as_json:
        click.echo(runs_json(entries))
        return
    click.echo(runs_text(entries), nl=False)
    click.echo(next_line(entries))


VERBS = (list_runs, compare)
