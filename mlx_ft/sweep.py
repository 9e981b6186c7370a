"""One recipe, many settings, one table.

Does: read `--grid KEY=V1,V2`, make the settings of each member, run unfinished members, and put the
results beside each other. Members share token ids and outputs of frozen layers through the usual
caches.
Does not: compare runs statistically.
"""

from __future__ import annotations

import random
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mlx_ft.errors import Fault, GateFailed, InputError, MlxFtError, RecipeError, RunError
from mlx_ft.inputs import OpenRun
from mlx_ft.pipeline import PREFLIGHT, is_done, run_pipeline
from mlx_ft.report.choice import selected_by
from mlx_ft.runs.document import ordered_columns, run_document
from mlx_ft.system.console import Console
from mlx_ft.text.quantities import is_number, loss, score
from mlx_ft.text.safe import clean, one_line

GRID = "--grid"
MOST_MEMBERS = 1000
CLOSING = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Member:
    """One member of a sweep: its settings as `KEY=VALUE`, and its run."""

    settings: tuple[str, ...]
    run: OpenRun


def split_values(text: str) -> list[str]:
    """Return the values between commas. Commas inside brackets or quotes do not split."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in CLOSING) - (letter in CLOSING.values())
        if letter == "," and depth == 0 and not quote:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]


def grid_settings(
    grids: Sequence[str], count: int | None = None, seed: int = 0
) -> list[tuple[str, ...]]:
    """Return the settings of each member: all combinations, or `count` of them drawn by `seed`.

    Raises RecipeError with everything that is wrong with the grids.
    """
    faults, axes, keys = [], [], set()
    for text in grids:
        key, equals, values_text = text.partition("=")
        values, key = split_values(values_text), key.strip()
        if not equals or not key or not all(values):
            fix = "write --grid train.learning_rate=1e-5,5e-6"
            faults.append(Fault(f"{GRID} {text!r}", "is not KEY=VALUE,VALUE", fix))
        elif key in keys:
            fix = "give all of its values in one --grid"
            faults.append(Fault(f"{GRID} {key}", "is given twice", fix))
        elif len(set(values)) < len(values):
            faults.append(Fault(f"{GRID} {text}", "has a value twice", "give each once"))
        keys.add(key)
        axes.append([f"{key}={value}" for value in values])
    if not grids:
        faults.append(Fault(GRID, "is missing", "say what differs: --grid train.seed=0,1,2"))
    if faults:
        raise RecipeError(faults)
    members = 1
    for axis in axes:
        members *= len(axis)
    if (count or members) > MOST_MEMBERS or members > MOST_MEMBERS**2:
        found = f"{members:,} members; a sweep has at most {MOST_MEMBERS:,}"
        raise RecipeError(Fault(GRID, found, "give fewer values, or draw some with --random"))
    combinations = list(product(*axes))
    if count is None or count >= len(combinations):
        return combinations
    drawn = random.Random(seed).sample(range(len(combinations)), count)
    return [combinations[index] for index in sorted(drawn)]


def open_members(
    settings: Sequence[tuple[str, ...]], open_with: Callable[[tuple[str, ...]], OpenRun]
) -> list[Member]:
    """Open every member before any is trained. Raises one error with all their faults."""
    members, faults = [], []
    for each in settings:
        try:
            members.append(Member(each, open_with(each)))
        except MlxFtError as error:
            faults += _of_member(each, error)
    if faults:
        raise RecipeError(faults)
    return members


def _of_member(settings: Sequence[str], error: MlxFtError) -> list[Fault]:
    return [Fault(f"{', '.join(settings)}: {f.where}", f.found, f.fix) for f in error.faults]


def _check_members(members: Sequence[Member], console: Console) -> None:
    """Check all unfinished members. Raises one error with the faults of all of them."""
    faults = []
    for number, member in enumerate(members, start=1):
        if is_done(member.run.job):
            continue
        settings = ", ".join(member.settings)
        console.heading(f"Sweep, checking {number} of {len(members)}: {settings}")
        try:
            run_pipeline(replace(member.run), PREFLIGHT)  # a copy, whose rows go when it is checked
        except RunError:
            pass  # of the place and not of the settings: it may be over when its turn comes
        except (GateFailed, InputError) as error:
            faults += _of_member(member.settings, error)
    if faults:
        raise RecipeError(faults)


def run_members(members: Sequence[Member], console: Console) -> list[MlxFtError]:
    """Check all members, then run each to its end. Return the errors of stopped members.

    Raises one error with the faults of all members that fail their checks.
    """
    _check_members(members, console)
    stopped: list[MlxFtError] = []
    for number, member in enumerate(members, start=1):
        console.heading(f"Sweep, {number} of {len(members)}: {', '.join(member.settings)}")
        try:
            run_pipeline(member.run)
        except (GateFailed, InputError) as error:
            for fault in error.faults:
                console.say(f"stopped: {fault}", "red")
            stopped.append(error)
    return stopped


def table_lines(members: Sequence[Member]) -> str:
    """Return the results of all members as a table for a terminal, ending with a newline."""
    documents = [run_document(member.run.job.folder) for member in members]
    suites = list(dict.fromkeys(name for d in documents for name in d["eval"] or {}))
    keys = [setting.partition("=")[0] for setting in members[0].settings]
    rows = []
    for member, document in zip(members, documents, strict=True):
        info = (document["train"] or {}).get("info") or {}
        given = [one_line(setting.partition("=")[2], 24) for setting in member.settings]
        chosen = score(info["chosen_score"]) if is_number(info.get("chosen_score")) else "-"
        measured = [_last_mean((document["eval"] or {}).get(name)) for name in suites]
        validation = loss(info.get("chosen_validation_loss")) if info else "-"
        rows.append(
            [*given, str(document["status"]), chosen, validation, *measured, document["run"]]
        )
    by = selected_by(documents[0]) or "score"
    head = [*keys, "status", by if by != "validation_loss" else "score", "validation loss"]
    text = tabulate(rows, [*head, *suites, "run"], tablefmt="simple", disable_numparse=True)
    return clean(text) + "\n"


def _last_mean(columns: dict[str, Any] | None) -> str:
    """Return the mean of the last measured column, which is the model that leaves the run."""
    names = ordered_columns(columns or {})
    return score(columns[names[-1]].get("mean")) if columns and names else "-"


def next_step(members: Sequence[Member]) -> str:
    """Return the command that compares the members."""
    runs: list[Path] = [member.run.job.folder for member in members]
    return shlex.join(["mlx-ft", "compare", *map(str, dict.fromkeys(runs))])
