"""Options that several verbs of the command line have, declared once. Does not: do anything."""

from __future__ import annotations

from pathlib import Path

import click

RUNS = click.option(
    "--runs",
    "runs_root",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder that holds the run folders.",
)
