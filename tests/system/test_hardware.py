"""The machine's facts are plausible, cheap and printable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_ft.system.hardware import _cgroup_limit, free_disk_bytes, machine


def test_the_machines_facts_are_those_of_the_system() -> None:
    facts = machine()
    assert facts.system in ("Linux", "Darwin")
    assert facts.processor
    assert 1 <= facts.cores <= (os.cpu_count() or 1)
    assert 2**28 < facts.memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert facts.python == ".".join(str(part) for part in sys.version_info[:3])


def test_asking_for_facts_does_not_import_mlx() -> None:
    code = "import sys; from mlx_ft.system import hardware; hardware.machine(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mlx_ft.system.hardware" in done.stdout.split()
    assert "mlx.core" not in done.stdout.split()


def test_free_disk_is_that_of_the_nearest_folder_above(tmp_path: Path) -> None:
    here, below = free_disk_bytes(tmp_path), free_disk_bytes(tmp_path / "runs" / "not-yet")
    assert here > 0
    assert abs(here - below) < 0.2 * here


@pytest.mark.parametrize(
    ("text", "limit"),
    [("max\n", None), ("4294967296\n", 4294967296), ("0", None), ("", None), ("\xff", None)],
)
def test_a_containers_limit(text: str, limit: int | None, tmp_path: Path) -> None:
    path = tmp_path / "memory.max"
    path.write_text(text, encoding="utf-8")
    assert _cgroup_limit(path) == limit
    assert _cgroup_limit(tmp_path / "none") is None
