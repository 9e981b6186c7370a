"""Small pure checks on what is known before training; nothing is changed, nothing is trained."""

from mlx_ft.preflight.checks import CHECKS, base_health, run_checks
from mlx_ft.preflight.findings import (
    Finding,
    OriginalFacts,
    PreflightInput,
    findings_json,
    raise_on_fail,
)
from mlx_ft.preflight.fit import fit_lines, fitting_sets
from mlx_ft.preflight.rows import trained_context

__all__ = [
    "CHECKS",
    "Finding",
    "OriginalFacts",
    "PreflightInput",
    "base_health",
    "findings_json",
    "fit_lines",
    "fitting_sets",
    "raise_on_fail",
    "run_checks",
    "trained_context",
]
