"""Collect all row errors and report them once.

Does: list at most twenty of a file, with totals by kind.
Does not: look for errors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ft.errors import DataError, Fault

LISTED_FAULTS = 20
SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Problem:
    """One fault of a file.

    line: 1-based; None means the whole file.
    kind: the name that totals count.
    """

    path: Path
    line: int | None
    kind: str
    found: str
    fix: str

    def fault(self) -> Fault:
        where = str(self.path) if self.line is None else f"{self.path}:{self.line}"
        return Fault(where, self.found, self.fix)


def shown(value: Any) -> str:
    """Return a JSON value of a file as one short line that any terminal can print."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = ascii(value[: SHOWN_CHARACTERS + 1] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _file_faults(path: Path, problems: Sequence[Problem]) -> list[Fault]:
    listed = [problem.fault() for problem in problems[:LISTED_FAULTS]]
    if len(problems) > LISTED_FAULTS:
        totals = Counter(problem.kind for problem in problems).most_common()
        by_kind = ", ".join(f"{count:,} {kind}" for kind, count in totals)
        found = f"{len(problems):,} faults in all ({by_kind}), the first {LISTED_FAULTS} are listed"
        listed.append(Fault(str(path), found, "correct these and run again"))
    return listed


def raise_problems(problems: Iterable[Problem]) -> None:
    """Raise one DataError with all files' problems, at most twenty listed of each; or nothing."""
    by_path: dict[Path, list[Problem]] = {}
    for problem in problems:
        by_path.setdefault(problem.path, []).append(problem)
    faults = [fault for path, found in by_path.items() for fault in _file_faults(path, found)]
    if faults:
        raise DataError(faults)
