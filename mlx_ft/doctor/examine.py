"""Run every check, keep the outcome for later runs, and print it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_ft.doctor.checks import Check, Figures, guarded, worst
from mlx_ft.doctor.facts import facts
from mlx_ft.doctor.numerics import numerics
from mlx_ft.doctor.speed import beside_mlx_lm, builtin_pace
from mlx_ft.engine.device import configure_backend
from mlx_ft.engine.load import release
from mlx_ft.model.builtin import builtin_in_cache
from mlx_ft.system.cache import cache_home
from mlx_ft.system.console import Progress
from mlx_ft.system.doctor_result import keep_result

SCHEMA = 1
BUILTIN = "smollm2-135m-instruct"


def all_checks(home: Path) -> list[tuple[str, Callable[[], Check]]]:
    """Return every check by name, in the order in which they run and are shown."""
    return [
        *facts(),
        *numerics(),
        ("steps", beside_mlx_lm),
        ("built-in model", lambda: builtin_pace(builtin_in_cache(BUILTIN, home))),
    ]


def examine(progress: Progress) -> list[Check]:
    """Run every check and keep the outcome; one that breaks is a failure, and the rest go on."""
    configure_backend()
    home = cache_home()
    checks = all_checks(home)
    found = []
    for index, (name, check) in enumerate(checks):
        progress.update(index / len(checks), name)
        found.append(guarded(name, check))
        release()
    progress.update(1.0, "done")
    keep_result(home, document(found))
    return found


def document(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the outcome as plain JSON."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": worst(checks),
        "checks": [{**asdict(check), "figures": _finite(check.figures)} for check in checks],
    }


def _finite(figures: Figures) -> dict[str, Any]:
    """Return figures as JSON can hold them: what is not a finite number is none."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
    }


def as_json(checks: Sequence[Check]) -> str:
    """Return the outcome as a JSON document."""
    return json.dumps(document(checks), indent=2)


def lines(checks: Sequence[Check]) -> Iterator[str]:
    """Yield a line for each check, with what to do below it, and what comes next."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        yield f"{check.status:4}  {check.name:{width}}  {check.found}"
        if check.advice:
            yield f"{'':4}  {'':{width}}  - {check.advice}"
    yield ""
    status = worst(checks)
    if status == "fail":
        yield "next     mend what failed before you train; mlx-ft doctor --json is for an issue"
    else:
        yield "next     make recipe=recipes/quickstart.yaml"
