"""The command line: group of verbs, exit codes, error printing. Nothing heavy before a verb runs.

Results go to stdout, narration to stderr. Exit codes: 0 done, 1 a gate stopped a bad model, 2 the
input is wrong, 130 interrupted.
"""

from __future__ import annotations

import select
import sys
from typing import TYPE_CHECKING, Any

import click

from mlx_ft import __version__
from mlx_ft.cli import deploy, prepare, run, runs
from mlx_ft.cli.options import console_for_people

if TYPE_CHECKING:
    from mlx_ft.errors import MlxFtError


# Verbs that find what they have finished, and go on from there.
GOES_ON = ("run", "train", "export", "eval", "sweep")


class _Verbs(click.Group):
    """The group of all verbs. A reader that closes the pipe early (`| head`) is no error.

    click itself would exit with code 1.
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


for verb in (*prepare.VERBS, *run.VERBS, *runs.VERBS, *deploy.VERBS):
    cli.add_command(verb)


def _print_error(error: MlxFtError) -> None:
    console = console_for_people()
    word = {1: "stopped", 2: "wrong input", 130: "interrupted"}[error.exit_code]
    style = "yellow" if error.exit_code == 130 else "red"
    for fault in error.faults:
        console.say(f"{word}: {fault}", style)


def _begin_again_or_end(error: Exception) -> None:
    """Say what failed of the GPU and begin the command again, where it goes on from a folder.

    Raises any other error again: it is our bug.
    """
    from mlx_ft.system.gpu_errors import device_failure
    from mlx_ft.system.restart import begin_again, failure_in_words

    cause = device_failure(error)
    if cause is None:
        raise error
    arguments = sys.argv[1:]
    verb = arguments[0] if arguments else "mlx-ft"
    if verb not in GOES_ON:
        console_for_people().say(f"{verb}: {cause.words} - {cause.fix}", "red")
        sys.exit(2)
    console_for_people().say(failure_in_words(cause, verb), "yellow")
    begin_again(arguments)
    sys.exit(2)


def main() -> None:
    """Run the command line. Users' errors become messages, our bugs tracebacks."""
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
    except (RuntimeError, MemoryError) as error:  # last: click's Exit and Abort are RuntimeErrors
        _begin_again_or_end(error)
