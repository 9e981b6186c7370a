"""The command line: verbs, arguments, exit codes. No logic, and nothing heavy until a verb runs.

Results go to stdout, narration to stderr. Exit codes: 0 done, 1 a gate stopped a bad model, 2 the
input is wrong, 130 interrupted.
"""

from __future__ import annotations

import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_ft import __version__
from mlx_ft.cli_all_runs import VERBS as ALL_RUNS_VERBS
from mlx_ft.cli_eval import evaluate
from mlx_ft.cli_experiments import VERBS as EXPERIMENTS
from mlx_ft.cli_options import DEFAULT_RUNS, RUNS, recipe_command
from mlx_ft.cli_runs import VERBS, console_for_people, open_job, show_result

if TYPE_CHECKING:
    from mlx_ft.errors import MlxFtError
    from mlx_ft.stages import Job

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


class _Verbs(click.Group):
    """The group of all verbs; one whose results nobody reads to the end (`| head`) has done well.

    click itself would call that exit code 1.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            stdout = select.poll()
            stdout.register(sys.stdout, 0)
            if stdout.poll(0):
                sys.stdout = None  # Python would complain again at exit
                sys.exit(0)
            raise RuntimeError("a pipe of our own broke") from error


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-ft")
def cli() -> None:
    """Fine-tune a model on MLX: one YAML recipe in, one trustworthy model out."""


def _opened(recipe: Path, sets: tuple[str, ...], runs_root: Path, fit: bool) -> Job:
    """Open a recipe, changed so that it fits into this machine's memory if that is wanted."""
    if not fit:
        return open_job(recipe, sets, runs_root)
    from mlx_ft.pipeline import fitted

    return fitted(lambda more: open_job(recipe, (*sets, *more), runs_root))


def _advance(
    recipe: Path, sets: tuple[str, ...], runs_root: Path, until: str, fit: bool = False
) -> Job:
    from mlx_ft.pipeline import run_pipeline

    job = _opened(recipe, sets, runs_root, fit)
    run_pipeline(job, until)
    return job


@cli.command()
@RECIPE
@SETS
@RUNS
@FIT
def check(recipe: Path, sets: tuple[str, ...], runs_root: Path, fit: bool) -> None:
    """Check a recipe, its data, its model and this machine; nothing is trained."""
    job = _advance(recipe, sets, runs_root, "preflight", fit)
    click.echo(f"{recipe}: nothing stops it")
    click.echo(f"next     {recipe_command('run', recipe, sets, runs_root, fit)}")
    click.echo(f"run      {job.run}")


@cli.command()
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
    from mlx_ft.pipeline import rehearse as rehearse_stages
    from mlx_ft.text.quantities import format_seconds

    seconds = rehearse_stages(lambda more: open_job(recipe, (*sets, *more), runs_root), miniature)
    click.echo(f"{recipe}: every stage went through, in {format_seconds(seconds)}")
    click.echo(f"next     {recipe_command('run', recipe, sets, runs_root)}")


@cli.command()
@RECIPE
@SETS
@RUNS
@FIT
def run(recipe: Path, sets: tuple[str, ...], runs_root: Path, fit: bool) -> None:
    """Do the whole job: check, train, export, evaluate, report.

    What is finished already is not done again; what was interrupted goes on.
    """
    show_result(_advance(recipe, sets, runs_root, "eval", fit).run)


@cli.command()
@RECIPE
@SETS
@RUNS
@FIT
def train(recipe: Path, sets: tuple[str, ...], runs_root: Path, fit: bool) -> None:
    """Train only, and leave the adapter.

    With an mlx-lm LoRA file, the adapter is left at its adapter_path.
    """
    from mlx_ft.adapter_output import deliver_adapter, require_deliverable

    job = _opened(recipe, sets, runs_root, fit)
    target = job.loaded.adapter_path
    if target is not None:
        require_deliverable(target)
    from mlx_ft.pipeline import run_pipeline

    run_pipeline(job, "train")
    adapter = job.run / "train" / "adapter"
    if target is not None:
        deliver_adapter(adapter, target)
        adapter = target
    click.echo(f"adapter  {adapter}")
    click.echo(f"next     {recipe_command('run', recipe, sets, runs_root, fit)}")


@cli.command()
@RECIPE
@SETS
@RUNS
def export(recipe: Path, sets: tuple[str, ...], runs_root: Path) -> None:
    """Go on as far as the exported models: fused 16-bit and quantized, both verified."""
    job = _advance(recipe, sets, runs_root, "export")
    click.echo(f"models   {job.run / 'export'}")
    click.echo(f"next     {recipe_command('eval', recipe, sets, runs_root)}")


@cli.command()
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
    from mlx_ft.preflight import fit_lines
    from mlx_ft.system.hardware import machine
    from mlx_ft.text.quantities import bytes_from_text

    memory_bytes = bytes_from_text(memory) if memory else machine().memory_bytes
    for line in fit_lines(memory_bytes, tokens, int(bits)):
        click.echo(line)
    click.echo("next     write a recipe, then mlx-ft check RECIPE --fit")


@cli.command()
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
    from mlx_ft.measuring import probe as look

    look(model, revision, enable_thinking, suites, console_for_people())
    click.echo(f"next     write a recipe with model: {model}, then mlx-ft check RECIPE")


@cli.group("data")
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
    from mlx_ft.recipe.load import load_recipe
    from mlx_ft.stages import show_rows
    from mlx_ft.system.console import colored

    loaded, in_color = load_recipe(recipe, sets), colored(sys.stdout)
    for row in show_rows(loaded.recipe, console_for_people(), split, rows, lines):
        click.echo(row_text(row, in_color), color=in_color)
    click.echo(f"next     {recipe_command('check', recipe, sets, DEFAULT_RUNS)}")


@cli.group("recipe")
def recipe_group() -> None:
    """Work with recipe files."""


@recipe_group.command()
@click.argument("file", type=click.Path(path_type=Path))
def upgrade(file: Path) -> None:
    """Print an mlx-lm LoRA file as a recipe."""
    from mlx_ft.recipe.load import load_recipe
    from mlx_ft.recipe.write import upgrade_text

    click.echo(upgrade_text(load_recipe(file, ())), nl=False)


for verb in (evaluate, *VERBS, *ALL_RUNS_VERBS, *EXPERIMENTS):
    cli.add_command(verb)


def _print_error(error: MlxFtError) -> None:
    console = console_for_people()
    word = {1: "stopped", 2: "wrong input", 130: "interrupted"}[error.exit_code]
    style = "yellow" if error.exit_code == 130 else "red"
    for fault in error.faults:
        console.say(f"{word}: {fault}", style)


def main() -> None:
    """Run the command line; a person's faults are messages, ours are tracebacks."""
    from mlx_ft.errors import MlxFtError

    try:
        cli.main(standalone_mode=False)
    except MlxFtError as error:
        _print_error(error)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
