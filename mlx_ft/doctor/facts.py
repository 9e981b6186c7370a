"""Facts of the machine: device, memory, limits, power, disk, versions."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Callable
from importlib.metadata import version

import mlx.core as mx

from mlx_ft import BLAS, __version__
from mlx_ft.doctor.checks import Check, Figures
from mlx_ft.engine.device import memory_limits, on_cpu
from mlx_ft.system.cache import cache_home
from mlx_ft.system.hardware import Machine, free_disk_bytes, machine
from mlx_ft.text.quantities import format_bytes

SMALL_MEMORY_BYTES = 8 << 30
# A 3B model in 16 bits, its quantized copy, and caches.
FREE_DISK_BYTES = 20 << 30
# MLX, mlx-lm and this package are tested together in these.
VERSIONS = {"mlx": "0.32.", "mlx-lm": "0.32."}


def facts(place: Machine | None = None) -> list[tuple[str, Callable[[], Check]]]:
    """Return the checks of the machine, by name."""
    here = place or machine()
    return [
        ("device", lambda: device(here)),
        ("memory", lambda: memory(here)),
        ("power", power),
        ("disk", disk),
        ("versions", versions),
    ]


def device(here: Machine) -> Check:
    """Say what computes."""
    figures: Figures = {
        "processor": here.processor,
        "cores": here.cores,
        "device": str(mx.default_device()),
    }
    if not on_cpu():
        kind = "Metal" if here.system == "Darwin" else "CUDA"
        name = str(mx.device_info().get("device_name", ""))
        return Check("device", "ok", f"{here.processor}; {kind}, {name}", "", figures)
    if here.system == "Darwin":
        found = f"{here.processor}; MLX computes on the CPU"
        advice = "install an arm64 Python: MLX's GPU is not there in this one"
        return Check("device", "fail", found, advice, figures)
    found = f"{here.processor}, {here.cores} cores; MLX computes on the CPU with {BLAS.name}"
    if not BLAS.fast:
        return Check("device", "warn", found, f"install OpenBLAS ({BLAS.detail})", figures)
    return Check("device", "ok", found, "", figures)


def memory(here: Machine) -> Check:
    """Say how much memory there is, and what MLX may hold of it."""
    limits = memory_limits()
    figures = {
        "memory_bytes": here.memory_bytes,
        "wired_limit_set_bytes": here.wired_limit_bytes,
        "working_set_bytes": None if limits is None else limits.wired_bytes,
        "cache_limit_bytes": None if limits is None else limits.cache_bytes,
    }
    found = format_bytes(here.memory_bytes)
    if limits is not None:
        found += f"; {limits.words}"
    if here.memory_bytes <= SMALL_MEMORY_BYTES:
        advice = "train models of up to 1B parameters, with train.low_memory: true; see mlx-ft fit"
        return Check("memory", "warn", found, advice, figures)
    return Check("memory", "ok", found, "", figures)


def _said_by(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def power() -> Check:
    """Say whether the machine saves power, which makes a training slow."""
    if platform.system() != "Darwin":
        return Check("power", "ok", "not asked on this system")
    return power_of(_said_by("/usr/bin/pmset", "-g"), _said_by("/usr/bin/pmset", "-g", "batt"))


def power_of(settings: str, battery: str) -> Check:
    """Return the check for what pmset says."""
    low = re.search(r"^\s*(?:lowpowermode|powermode)\s+1\b", settings, re.MULTILINE) is not None
    on_battery = "Battery Power" in battery
    figures = {"low_power_mode": low, "on_battery": on_battery}
    if low:
        advice = "turn Low Power Mode off while you train"
        return Check("power", "warn", "Low Power Mode is on", advice, figures)
    if on_battery:
        return Check("power", "warn", "on battery", "plug it in for a long training", figures)
    return Check("power", "ok", "plugged in, full power", "", figures)


def disk() -> Check:
    """Say how much of the cache's disk is free."""
    free = free_disk_bytes(cache_home())
    found, figures = f"{format_bytes(free)} free for models and caches", {"free_bytes": free}
    if free < FREE_DISK_BYTES:
        wanted = format_bytes(FREE_DISK_BYTES)
        advice = f"have {wanted} free for a 3B model: mlx-ft clean shows what can go"
        return Check("disk", "warn", found, advice, figures)
    return Check("disk", "ok", found, "", figures)


def versions() -> Check:
    """Say which versions are installed, and whether they are those that are tested."""
    figures = {
        "mlx_ft": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name.replace("-", "_"): version(name) for name in VERSIONS},
    }
    found = ", ".join(f"{name} {text}" for name, text in figures.items())
    other = [name for name, tested in VERSIONS.items() if not version(name).startswith(tested)]
    if other:
        advice = f"install the tested versions again: {', '.join(other)} is another one"
        return Check("versions", "warn", found, advice, figures)
    return Check("versions", "ok", found, "", figures)
