"""The command line: verbs, arguments, exit codes. No logic, and nothing heavy until a verb runs.

Results go to stdout, narration to stderr. Exit codes: 0 done, 1 a gate stopped a bad model, 2 the
input is wrong, 130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_ft import __version__

if TYPE_CHECKING:
    from mlx_ft.console import Console
    from mlx_ft.errors import MlxFtError
    from mlx_ft.stages import Job

SETS = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value of the recipe, such as train.seed=1; may be repeated.",
)
RUNS = click.option(
    "--runs",
    "runs_root",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder that holds the run folders.",
)
RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
RUN = click.argument("run", type=click.Path(path_type=Path))
COLUMN = click.option(
    "--column",
    type=click.Choice(["base", "adapter", "fused", "quantized"]),
    default="quantized",
    show_default=True,
    help="Which model of the run.",
)
EXPORTED = ["quantized", "fused"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-ft")
def cli() -> None:
    """Fine-tune a model on MLX: one YAML recipe in, one trustworthy model out."""


def _console() -> Console:
    from mlx_ft.console import Console

    return Console()


def _open(recipe: Path, sets: tuple[str, ...], runs_root: Path) -> Job:
    """Load a recipe (or the one inside a run folder) and find its run."""
    from mlx_ft.recipe_loading import load_recipe

    if recipe.is_dir() and (recipe / "recipe.yaml").exists():
        runs_root, recipe = recipe.resolve().parent, recipe / "recipe.yaml"
    loaded = load_recipe(recipe, sets)
    from mlx_ft.pipeline import open_run

    console = _console()
    for note in loaded.notes:
        console.say(note)
    return open_run(loaded, runs_root, console)


def _advance(recipe: Path, sets: tuple[str, ...], runs_root: Path, until: str) -> Job:
    from mlx_ft.pipeline import run_pipeline

    job = _open(recipe, sets, runs_root)
    run_pipeline(job, until)
    return job


def _show_result(run: Path) -> None:
    from mlx_ft.report.summary import run_document
    from mlx_ft.report.terminal import result_lines

    click.echo(result_lines(run_document(run), run), nl=False)


@cli.command()
@RECIPE
@SETS
@RUNS
def check(recipe: Path, sets: tuple[str, ...], runs_root: Path) -> None:
    """Check a recipe, its data, its model and this machine; nothing is trained."""
    job = _advance(recipe, sets, runs_root, "preflight")
    click.echo(f"{recipe}: nothing stops it\nnext     mlx-ft run {recipe}")
    click.echo(f"run      {job.run}")


@cli.command()
@RECIPE
@SETS
@RUNS
def rehearse(recipe: Path, sets: tuple[str, ...], runs_root: Path) -> None:
    """Check, then go through every stage with a few rows and steps.

    So that a long run does not fail at its last stage. Nothing of it is kept.
    """
    from mlx_ft.hardware import format_seconds
    from mlx_ft.pipeline import rehearse as rehearse_stages
    from mlx_ft.rehearsal import rehearsal_sets

    checked = _advance(recipe, sets, runs_root, "preflight")
    small = _open(recipe, (*sets, *rehearsal_sets(checked.recipe)), runs_root)
    seconds = rehearse_stages(small)
    click.echo(f"{recipe}: every stage went through, in {format_seconds(seconds)}")
    click.echo(f"next     mlx-ft run {recipe}")


@cli.command()
@RECIPE
@SETS
@RUNS
def run(recipe: Path, sets: tuple[str, ...], runs_root: Path) -> None:
    """Do the whole job: check, train, export, evaluate, report.

    What is finished already is not done again; what was interrupted goes on.
    """
    _show_result(_advance(recipe, sets, runs_root, "eval").run)


@cli.command()
@RECIPE
@SETS
@RUNS
def train(recipe: Path, sets: tuple[str, ...], runs_root: Path) -> None:
    """Train only, and leave the adapter.

    With an mlx-lm LoRA file, the adapter is left at its adapter_path.
    """
    from mlx_ft.adapter_output import deliver_adapter, require_deliverable

    job = _open(recipe, sets, runs_root)
    target = job.loaded.adapter_path
    if target is not None:
        require_deliverable(target)
    from mlx_ft.pipeline import run_pipeline

    run_pipeline(job, "train")
    adapter = job.run / "train" / "adapter"
    if target is not None:
        deliver_adapter(adapter, target)
        adapter = target
    click.echo(f"adapter  {adapter}\nnext     mlx-ft run {recipe}")


@cli.command()
@RECIPE
@SETS
@RUNS
def export(recipe: Path, sets: tuple[str, ...], runs_root: Path) -> None:
    """Go on as far as the exported models: fused 16-bit and quantized, both verified."""
    job = _advance(recipe, sets, runs_root, "export")
    click.echo(f"models   {job.run / 'export'}\nnext     mlx-ft eval {recipe}")


@cli.command("eval")
@RECIPE
@SETS
@RUNS
def evaluate(recipe: Path, sets: tuple[str, ...], runs_root: Path) -> None:
    """Go on as far as the evaluation of base, adapter, fused and quantized model."""
    _show_result(_advance(recipe, sets, runs_root, "eval").run)


@cli.command()
@RUN
def report(run: Path) -> None:
    """Write a run's report.html again, from what is in its folder."""
    from mlx_ft.report.html import write_report

    click.echo(write_report(run))


@cli.command()
@RUN
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON document.")
def show(run: Path, as_json: bool) -> None:
    """Print a run's result."""
    from mlx_ft.report.summary import document_json, run_document

    if as_json:
        click.echo(document_json(run_document(run)))
    else:
        _show_result(run)


@cli.command()
@RUN
@COLUMN
@click.option("--max-tokens", type=click.IntRange(1, 8192), default=256, show_default=True)
def chat(run: Path, column: str, max_tokens: int) -> None:
    """Talk to a run's model through its chat template; an empty line or Ctrl-D ends it."""
    from mlx_ft.stages import chat_turns

    job = _open(run, (), run.parent)
    for answer in chat_turns(job, column, max_tokens, sys.stdin):
        click.echo(answer)


@cli.command()
@RUN
@click.option("--lm-studio", "target", flag_value="lm-studio", help="Into LM Studio.")
@click.option("--ollama", "target", flag_value="ollama", help="Into Ollama, from the GGUF file.")
@click.option("--name", help="Name of the model there; made from the run's name when left out.")
@click.option("--column", type=click.Choice(EXPORTED), help="LM Studio: quantized, if not given.")
@click.option("--link", is_flag=True, help="LM Studio: link the run's folder instead of a copy.")
@click.option(
    "--models-folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="LM Studio: its models folder, where it is not found by itself.",
)
def install(
    run: Path,
    target: str | None,
    name: str | None,
    column: str | None,
    link: bool,
    models_folder: Path | None,
) -> None:
    """Put a finished run's model into LM Studio or Ollama."""
    if target == "lm-studio":
        from mlx_ft.install import install_lm_studio

        lines = install_lm_studio(
            run,
            column=column or "quantized",
            name=name,
            models_folder=models_folder,
            link=link,
            console=_console(),
        )
    elif target == "ollama" and not (column or link or models_folder):
        from mlx_ft.ollama import install_ollama

        lines = install_ollama(run, name=name, console=_console())
    else:
        raise click.UsageError(
            "--column, --link and --models-folder are for --lm-studio"
            if target
            else "say where: --lm-studio or --ollama"
        )
    for line in lines:
        click.echo(line)


@cli.command()
@RUN
@COLUMN
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True)
def serve(run: Path, column: str, host: str, port: int) -> None:
    """Serve a run's model to OpenAI clients until Ctrl-C."""
    from mlx_ft.serve import serve as serve_run

    for line in serve_run(run, column=column, host=host, port=port, console=_console()):
        click.echo(line)


@cli.command()
@RUN
@click.argument("repo", metavar="REPO")
@click.option("--column", type=click.Choice(EXPORTED), default="quantized", show_default=True)
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--yes", is_flag=True, help="Upload without asking.")
def publish(run: Path, repo: str, column: str, private: bool, yes: bool) -> None:
    """Upload a finished run's model to the Hugging Face Hub as REPO (owner/name).

    With a card made from the run's evidence. What would go is listed first.
    """
    from mlx_ft.errors import Fault, RunError
    from mlx_ft.publish import listing, prepare_upload, send

    upload = prepare_upload(run, repo, column=column, private=private)
    for line in listing(upload):
        click.echo(line)
    if not yes and not (sys.stdin.isatty() and click.confirm("Upload this?", err=True)):
        raise RunError(Fault(repo, "nothing was uploaded", "say yes when asked, or give --yes"))
    click.echo(f"model    {send(upload)}")
    click.echo(f"next     mlx_lm.generate --model {repo} --prompt Hello")


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
    from mlx_ft.console import colored
    from mlx_ft.data.show import row_text
    from mlx_ft.recipe_loading import load_recipe
    from mlx_ft.stages import show_rows

    loaded, in_color = load_recipe(recipe, sets), colored(sys.stdout)
    for row in show_rows(loaded.recipe, _console(), split, rows, lines):
        click.echo(row_text(row, in_color), color=in_color)
    click.echo(f"next     mlx-ft check {recipe}")


@cli.group("recipe")
def recipe_group() -> None:
    """Work with recipe files."""


@recipe_group.command()
@click.argument("file", type=click.Path(path_type=Path))
def upgrade(file: Path) -> None:
    """Print an mlx-lm LoRA file as a recipe."""
    from mlx_ft.recipe_loading import load_recipe, upgrade_text

    click.echo(upgrade_text(load_recipe(file, ())), nl=False)


def _print_error(error: MlxFtError) -> None:
    console = _console()
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
    except BrokenPipeError:
        # Whoever read us (`| head`) has seen enough; Python would complain again at exit.
        sys.stdout = None
        sys.exit(0)
