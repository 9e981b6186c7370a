"""The machine's facts are plausible, cheap and printable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_ft.errors import RecipeError
from mlx_ft.system.hardware import _cgroup_limit, device_description, free_disk_bytes, machine
from mlx_ft.text.quantities import bytes_from_text, format_bytes, format_seconds


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


def test_the_device_is_one_line() -> None:
    assert device_description() and "\n" not in device_description()


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


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_999, "1.00 MB"),
        (1_234_567, "1.23 MB"),
        (123_456_789, "123 MB"),
        (25_276_510_208, "25.28 GB"),
        (2e12, "2.00 TB"),
    ],
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (0.421, "0.42 s"),
        (9.999, "10 s"),
        (59.7, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (11_220, "3 h 07 min"),
    ],
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [("16GB", 16 * 10**9), ("0.5 gb", 5 * 10**8), ("800 MB", 8 * 10**8), ("2T", 2 * 10**12)],
)
def test_sizes_are_read_in_decimal_units(text: str, count: int) -> None:
    assert bytes_from_text(text) == count


@pytest.mark.parametrize("text", ["", "16", "GB", "-1GB", "16 PB", "1e3GB"])
def test_what_is_not_a_size_is_a_message(text: str) -> None:
    with pytest.raises(RecipeError, match="16GB"):
        bytes_from_text(text)
