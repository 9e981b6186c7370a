"""A command begins again a few times, and not for ever."""

import os
import sys

import pytest

from mlx_ft.system.gpu_errors import known_cause
from mlx_ft.system.restart import FAILURES, MAX_FAILURES, begin_again, failure_in_words


def test_the_same_command_takes_this_processs_place_and_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, arguments: called.append(arguments))
    monkeypatch.setenv(FAILURES, "0")
    cause = known_cause("Caused GPU Hang Error")
    assert cause is not None
    said = []
    for _ in range(MAX_FAILURES + 2):
        said.append(failure_in_words(cause, "run"))
        begin_again(["run", "x.yaml"])
    assert called == [[sys.executable, "-m", "mlx_ft", "run", "x.yaml"]] * (MAX_FAILURES - 1)
    assert all("begins again" in words for words in said[: MAX_FAILURES - 1])
    assert cause.fix in said[-1] and "begins again" not in said[-1]
