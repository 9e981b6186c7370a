"""Small pure checks on what is known before training; nothing is changed, nothing is trained."""

from mlx_ft.preflight.checks import CHECKS, run_checks
from mlx_ft.preflight.findings import Finding, PreflightInput, findings_json, raise_on_fail

__all__ = [
    "CHECKS",
    "Finding",
    "PreflightInput",
    "findings_json",
    "raise_on_fail",
    "run_checks",
]
