"""Verbs for a finished model: chat, serve, install, publish. No logic."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mlx_ft.cli.options import COLUMN, RUN, console_for_people, open_recipe
from mlx_ft.recipe.names import DEFAULT_COLUMN, EXPORTED

# As choices, the default first.
MODELS = EXPORTED[::-1]


@click.command()
@RUN
@COLUMN
@click.option("--max-tokens", type=click.IntRange(1, 8192), default=256, show_default=True)
def chat(run: Path, column: str, max_tokens: int) -> None:
    """Talk to a run's model through its chat template; an empty line or Ctrl-D ends it."""
    from mlx_ft.deploy.chat import chat_turns

    job = open_recipe(run, (), run.parent).job
    for answer in chat_turns(job, column, max_tokens, sys.stdin):
        click.echo(answer)


@click.command()
@RUN
@click.option("--lm-studio", "target", flag_value="lm-studio", help="Into LM Studio.")
@click.option("--ollama", "target", flag_value="ollama", help="Into Ollama, from the GGUF file.")
@click.option("--name", help="Name of the model there; made from the run's name when left out.")
@click.option("--column", type=click.Choice(MODELS), help="LM Studio: quantized, if not given.")
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
        from mlx_ft.deploy.lm_studio import install_lm_studio

        lines = install_lm_studio(
            run,
            column=column or DEFAULT_COLUMN,
            name=name,
            models_folder=models_folder,
            link=link,
            console=console_for_people(),
        )
    elif target == "ollama" and not (column or link or models_folder):
        from mlx_ft.deploy.ollama import install_ollama

        lines = install_ollama(run, name=name, console=console_for_people())
    else:
        raise click.UsageError(
            "--column, --link and --models-folder are for --lm-studio"
            if target
            else "say where: --lm-studio or --ollama"
        )
    for line in lines:
        click.echo(line)


@click.command()
@RUN
@COLUMN
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True)
def serve(run: Path, column: str, host: str, port: int) -> None:
    """Serve a run's model to OpenAI clients until Ctrl-C."""
    from mlx_ft.deploy.serve import serve as serve_run

    for line in serve_run(run, column=column, host=host, port=port, console=console_for_people()):
        click.echo(line)


@click.command()
@RUN
@click.argument("repo", metavar="REPO")
@click.option("--column", type=click.Choice(MODELS), default=DEFAULT_COLUMN, show_default=True)
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--yes", is_flag=True, help="Upload without asking.")
def publish(run: Path, repo: str, column: str, private: bool, yes: bool) -> None:
    """Upload a finished run's model to the Hugging Face Hub as REPO (owner/name).

    With a card made from the run's evidence. What would go is listed first.
    """
    from mlx_ft.deploy.huggingface import listing, prepare_upload, send
    from mlx_ft.errors import Fault, RunError

    upload = prepare_upload(run, repo, column=column, private=private)
    for line in listing(upload):
        click.echo(line)
    if not yes and not (sys.stdin.isatty() and click.confirm("Upload this?", err=True)):
        raise RunError(Fault(repo, "nothing was uploaded", "say yes when asked, or give --yes"))
    click.echo(f"model    {send(upload)}")
    click.echo(f"next     mlx_lm.generate --model {repo} --prompt Hello")


VERBS = (chat, serve, install, publish)
