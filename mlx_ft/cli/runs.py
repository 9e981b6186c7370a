"""Verbs on run folders: runs, show, report, watch, compare, clean. No logic."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from mlx_ft.cli.options import RUN, RUNS, command_line, console_for_people, runs_option, show_result
from mlx_ft.report.compare.names import FORMATS, Format
from mlx_ft.runs.names import STATES


@click.command()
@RUN
def report(run: Path) -> None:
    """Write a run's report.html again, from what is in its folder."""
    from mlx_ft.report.html import write_report

    click.echo(write_report(run))


@click.command()
@RUN
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON document.")
def show(run: Path, as_json: bool) -> None:
    """Print a run's result."""
    from mlx_ft.runs.document import document_json, run_document

    if as_json:
        click.echo(document_json(run_document(run)))
    else:
        show_result(run)


DEFAULT_DAYS = 7.0


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="text, if not given, or what the ending of --output says.",
)
@click.option("--output", type=click.Path(path_type=Path), help="File to write instead.")
def compare(runs: tuple[Path, ...], form: Format | None, output: Path | None) -> None:
    """Set runs beside each other: what was changed, losses, scores, time, memory.

    The first run is the baseline. Scores are judged prompt by prompt.
    """
    from mlx_ft.report.compare.document import compare as compare_runs
    from mlx_ft.report.compare.document import form_of, write_comparison

    comparison = compare_runs(runs)
    text = form_of(form, output)(comparison)
    if output is None:
        click.echo(text, nl=False)
        if form in (None, "text"):
            click.echo(f"next     {command_line('show', runs[:1], {})}")
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
    from mlx_ft.report.runs_table import next_line, runs_json, runs_text
    from mlx_ft.runs.listing import list_runs as entries_of

    entries = entries_of(runs_root, states, names, newest)
    if as_json:
        click.echo(runs_json(entries))
        return
    click.echo(runs_text(entries), nl=False)
    click.echo(next_line(entries))


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def watch(run: Path) -> None:
    """Look at a run that goes on in another process, until it ends.

    Curves, memory, time left, last answers; lines of a log where there is no terminal. Ctrl-C ends
    only the watching. Exit code 0 when the run ended well, else 1.
    """
    from mlx_ft.report.watch import next_line
    from mlx_ft.report.watch import watch as watch_run

    try:
        code = watch_run(run, sys.stdout)
    except KeyboardInterrupt:
        click.echo(f"{run}: no longer watched; the run itself goes on", err=True)
        code = 130
    click.echo(next_line(run))
    sys.exit(code)


@click.command()
@click.argument("runs", metavar="[RUN...]", nargs=-1, type=click.Path(path_type=Path))
@RUNS
@click.option("--checkpoints", is_flag=True, help="All but the best, pinned and resumable ones.")
@click.option("--fused", is_flag=True, help="16-bit models of finished runs.")
@click.option("--stale", is_flag=True, help="Left-overs of processes that died.")
@click.option("--prefix", is_flag=True, help="Outputs of frozen layers in the cache.")
@click.option("--failed", is_flag=True, help="Whole runs that failed or were stopped by a gate.")
@click.option(
    "--older-than",
    type=click.FloatRange(0),
    default=DEFAULT_DAYS,
    show_default=True,
    help="Days that --prefix and --failed must have been left alone.",
)
@click.option("--yes", is_flag=True, help="Remove without asking.")
def clean(
    runs: tuple[Path, ...], runs_root: Path, older_than: float, yes: bool, **kinds: bool
) -> None:
    """Show what could be removed, and remove it when asked.

    Without a kind everything is shown and nothing is removed. Never the best or a pinned
    checkpoint, and nothing of a run that is worked on.
    """
    from mlx_ft.runs.clean import KINDS, find_rubbish, listing, remove_all, sum_line

    chosen = [kind for kind in KINDS if kinds[kind]]
    if yes and not chosen:
        raise click.UsageError(f"say what: {', '.join(f'--{kind}' for kind in KINDS)}")
    found = find_rubbish(runs_root, runs, chosen or list(KINDS), older_than)
    for line in listing(found):
        click.echo(line)
    listed = command_line("runs", (), runs_option(runs_root))
    asked = chosen and found and not yes and sys.stdin.isatty()
    if chosen and found and (yes or (asked and click.confirm("Remove this?", err=True))):
        freed, errors = remove_all(found, console_for_people())
        click.echo(sum_line(freed))
        click.echo(f"next     {listed}")
        sys.exit(2 if errors else 0)
    click.echo("nothing was removed")
    removes = chosen or [each.kind for each in found[:1]]
    again = _clean_command(runs, runs_root, removes, older_than) if found else listed
    click.echo(f"next     {again}")


def _clean_command(
    runs: tuple[Path, ...], runs_root: Path, kinds: Sequence[str], older_than: float
) -> str:
    """Return the command that deletes, without asking, everything these arguments have listed."""
    age = {} if older_than == DEFAULT_DAYS else {"--older-than": older_than}
    flags = {f"--{kind}": True for kind in kinds}
    return command_line("clean", runs, {**runs_option(runs_root), **flags, **age, "--yes": True})


VERBS = (list_runs, show, report, watch, compare, clean)
