"""Outcome of one check, and the guard that turns any error into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlx_ft.system.gpu_errors import device_failure

Status = Literal["ok", "warn", "fail"]
Figures = Mapping[str, float | int | str | bool | None]


@dataclass(frozen=True)
class Check:
    """Outcome of one check.

    found: in words.
    advice: what to do (empty when there is nothing to do).
    figures: numbers and texts behind it, with their units in the names.
    """

    name: str
    status: Status
    found: str
    advice: str = ""
    figures: Figures = field(default_factory=dict)


REPORT = "open an issue with the output of mlx-ft doctor --json"


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """Return a check's outcome; an error in it is a failure, in words."""
    try:
        return check()
    except Exception as error:  # a broken machine may raise anything, and the other checks go on
        cause = device_failure(error)
        if cause is not None:
            return Check(name, "fail", cause.words, cause.fix)
        return Check(name, "fail", f"{type(error).__name__}: {error}", REPORT)


def worst(checks: Sequence[Check]) -> Status:
    """Return the worst status of some checks."""
    order: tuple[Status, ...] = ("ok", "warn", "fail")
    return max((check.status for check in checks), key=order.index, default="ok")
