"""`mlx-ft eval TARGET... --suite FILE`: any models, side by side.

Does: find the models, and have the suites answered into a folder; a second call goes on there.
Does not: train, or print results.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mlx_ft.errors import Fault, InputError, Interrupted, RunError
from mlx_ft.evaluate.column import Column
from mlx_ft.evaluate.endpoint import Endpoint, server_column
from mlx_ft.evaluate.harness import evaluate
from mlx_ft.evaluate.lm_eval import Tasks, require_lm_eval, require_models, run_tasks, task_rows
from mlx_ft.evaluate.stage import answers_folder, suite_progress
from mlx_ft.evaluate.suites import Suite, load_suites
from mlx_ft.evaluate.targets import Target, read_targets
from mlx_ft.model.chat import ChatFormat
from mlx_ft.recipe.cli_defaults import DEFAULT_BATCH_SIZE, DEFAULT_DATE
from mlx_ft.runs.folder import run_folder
from mlx_ft.system.console import Console
from mlx_ft.system.files import disk_errors_explained, hash_of
from mlx_ft.system.signals import interruptible
from mlx_ft.text.safe import printable


@dataclass(frozen=True)
class ServerAddress:
    """An OpenAI-compatible server.

    url: up to /v1.
    model: its model's name there.
    key_variable: the environment variable that holds its key, if it wants one.
    """

    url: str
    model: str
    key_variable: str | None = None


@dataclass(frozen=True)
class Wanted:
    """One call of `mlx-ft eval`.

    targets: as they were typed.
    enable_thinking: the mode to ask in; None means the one that each run was trained with.
    date: what templates of models without a run call today.
    """

    targets: tuple[str, ...]
    suites: tuple[Path, ...]
    server: ServerAddress | None = None
    tasks: Tasks | None = None
    limit: int | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    enable_thinking: bool | None = None
    date: str = DEFAULT_DATE
    allow_template_mismatch: bool = False
    folder: Path | None = None
    runs_root: Path = Path("runs")


def evaluate_targets(wanted: Wanted, console: Console) -> tuple[dict[str, Any], Path]:
    """Measure what is wanted; return the results and the folder with all answers.

    The same call goes on where it was stopped. Raises InputError with all faults of targets and
    suites, and Interrupted on Ctrl-C.
    """
    if wanted.tasks is not None:
        require_lm_eval()
        require_models(wanted.server)
    suites = _suites(wanted)
    # What servers and models without a run are asked in.
    thinking = wanted.enable_thinking
    if thinking is None and len({suite.enable_thinking for suite in suites}) == 1:
        thinking = suites[0].enable_thinking
    targets, columns = _models(wanted, ChatFormat(bool(thinking), wanted.date), console)
    folder = wanted.folder or _default_folder(wanted, suites, columns)
    results: dict[str, Any] = {}
    try:
        with interruptible(), disk_errors_explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if suites:
                results |= _ask_suites(wanted, suites, columns, folder, console)
            if wanted.tasks is not None:
                allow = wanted.allow_template_mismatch
                results["lm_eval"] = run_tasks(
                    wanted.tasks, targets, folder, console, allow_template_mismatch=allow
                )
    except KeyboardInterrupt:
        kept = "what was answered is kept"
        raise Interrupted(Fault(str(folder), kept, "give the same command again")) from None
    return results, folder


def _ask_suites(
    wanted: Wanted,
    suites: Sequence[Suite],
    columns: Sequence[Column],
    folder: Path,
    console: Console,
) -> dict[str, Any]:
    with suite_progress(console, suites, len(columns)) as progress:
        results = evaluate(
            suites,
            columns,
            folder,
            progress=progress,
            allow_template_mismatch=wanted.allow_template_mismatch,
            cache_folder=answers_folder(),
        )
    for warning in results["warnings"]:
        console.say(f"warning: {warning}", "yellow")
    return results


def evaluation_lines(results: Mapping[str, Any], folder: Path) -> str:
    """Return results as text for a terminal: a row a column, the mean of each suite with its 95 %
    interval.
    """
    lines: list[str] = []
    suites = results.get("suites") or {}
    if suites:
        names = list(next(iter(suites.values())))
        rows = [[name, *(_mean(columns[name]) for columns in suites.values())] for name in names]
        head = ["", *(f"{suite} (n {_count(columns)})" for suite, columns in suites.items())]
        lines += [tabulate(rows, head, tablefmt="simple", disable_numparse=True), ""]
    if results.get("lm_eval"):
        rows = task_rows(results["lm_eval"])
        head = ["", "task", "metric", "value"]
        lines += [tabulate(rows, head, tablefmt="simple", disable_numparse=True), ""]
    lines += [f"WARNING  {warning}" for warning in results.get("warnings") or ()]
    lines += [f"answers  {folder}"]
    lines += [f"next     read the answers: {folder}/<suite>/<column>.jsonl, a line a prompt"]
    return printable("\n".join(lines)) + "\n"


def _mean(summary: Mapping[str, Any]) -> str:
    return f"{summary['mean']:.2f} ({summary['low']:.2f} to {summary['high']:.2f})"


def _count(columns: Mapping[str, Any]) -> int:
    return max(int(summary["n"]) for summary in columns.values())


def _suites(wanted: Wanted) -> tuple[Suite, ...]:
    suites = load_suites(list(wanted.suites))
    return tuple(replace(suite, samples=suite.samples[: wanted.limit]) for suite in suites)


def _models(
    wanted: Wanted, chat: ChatFormat, console: Console
) -> tuple[list[Target], list[Column]]:
    """Return the targets, and the columns of these and of the server; raise all faults at once.

    chat: the format of models without a run, and of the server.
    """
    targets: list[Target] = []
    columns: list[Column] = []
    faults: list[Fault] = []
    try:
        targets = read_targets(
            wanted.targets,
            # A run keeps the mode of its training unless another is asked for.
            enable_thinking=wanted.enable_thinking,
            default=chat,
            console=console,
        )
        columns += [target.column(wanted.batch_size) for target in targets]
    except InputError as error:
        faults += error.faults
    if wanted.server is not None:
        try:
            columns.append(_server(wanted.server, chat.enable_thinking, wanted.batch_size))
        except InputError as error:
            faults += error.faults
    if faults:
        raise InputError(faults)
    return targets, columns


def _server(address: ServerAddress, thinking: bool, concurrency: int) -> Column:
    key = None
    if address.key_variable is not None:
        key = os.environ.get(address.key_variable)
        if not key:
            fix = "set it, or leave --server-key-env out"
            raise RunError(Fault(address.key_variable, "is not set in the environment", fix))
    url = address.url.rstrip("/")
    return server_column(Endpoint(url, address.model, thinking, concurrency, key))


def _default_folder(wanted: Wanted, suites: Sequence[Suite], columns: Sequence[Column]) -> Path:
    """Return `<runs>/eval-<8 hex>`, the same for the same suites and models."""
    asked = [[suite.file_sha256, len(suite.samples)] for suite in suites]
    identity = hash_of([asked, sorted([column.name, column.sha256] for column in columns)])
    return run_folder(wanted.runs_root, "eval", identity)
