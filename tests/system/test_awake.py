"""A Mac is kept awake for the length of a run, and no longer."""

import os
import sys
import time
from pathlib import Path

import pytest

from mlx_ft.system.awake import awake

TOOL = """#!/bin/sh
echo "$$ $@" > {place}/called
exec sleep 60
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_systems_tool_runs_within_and_ends_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "caffeinate"
    tool.write_text(TOOL.format(place=tmp_path))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "platform", "darwin")
    with awake() as effective:
        assert effective
        while not (tmp_path / "called").exists() or not (tmp_path / "called").read_text():
            time.sleep(0.01)
        pid, *arguments = (tmp_path / "called").read_text().split()
        assert arguments == ["-i", "-w", str(os.getpid())] and alive(int(pid))
    assert not alive(int(pid))


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_without_the_tool_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "platform", system)
    with awake() as effective:
        assert not effective
