"""Facts of a machine become a line each, with what to do."""

from dataclasses import replace

import pytest

from mlx_ft.doctor import facts
from mlx_ft.engine.device import AS_GPU
from mlx_ft.system.hardware import Machine

MAC = Machine("Darwin", "Apple M2", 8, 17_179_869_184, "3.12.1")
LOW = "System-wide power settings:\nCurrently in use:\n lowpowermode         1\n sleep 1\n"
FULL = LOW.replace("lowpowermode         1", "lowpowermode         0")
PLUGGED, UNPLUGGED = "Now drawing from 'AC Power'\n", "Now drawing from 'Battery Power'\n"


@pytest.mark.parametrize(
    ("settings", "battery", "status"),
    [
        (FULL, PLUGGED, "ok"),
        (LOW, PLUGGED, "warn"),
        (FULL, UNPLUGGED, "warn"),
        (LOW, UNPLUGGED, "warn"),
        ("", "", "ok"),
    ],
)
def test_what_saves_power_is_told(settings: str, battery: str, status: str) -> None:
    check = facts.power_of(settings, battery)
    assert check.status == status and bool(check.advice) == (status == "warn")


def test_a_mac_whose_mlx_computes_on_the_cpu_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert facts.device(MAC).status == "fail"
    monkeypatch.setenv(AS_GPU, "1")
    assert facts.device(MAC).status == "ok"


def test_little_memory_is_told() -> None:
    assert facts.memory(MAC).status == "ok"
    check = facts.memory(replace(MAC, memory_bytes=8 << 30))
    assert check.status == "warn" and "low_memory" in check.advice


def test_another_version_than_the_tested_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert facts.versions().status == "ok"
    monkeypatch.setattr(facts, "VERSIONS", {"mlx": "0.1.", "mlx-lm": "0.32."})
    check = facts.versions()
    assert check.status == "warn" and "mlx is another" in check.advice


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "free_disk_bytes", lambda _: 1 << 30)
    assert facts.disk().status == "warn"
