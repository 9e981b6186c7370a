"""Find out this machine's processor, cores, memory and free disk. Does not import MLX."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CGROUP_MEMORY_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),  # version 2
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),  # version 1
)
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """Facts of one machine.

    system: Linux or Darwin.
    cores: CPU cores that this process may use.
    memory_bytes: physical memory, or the limit of the container.
    wired_limit_bytes: what the GPU may hold of it where the user has set that, else 0.
    """

    system: str
    processor: str
    cores: int
    memory_bytes: int
    python: str
    wired_limit_bytes: int = 0


def machine() -> Machine:
    """Return the facts of this machine. Never raises; an unknown processor is its architecture."""
    return Machine(
        system=platform.system(),
        processor=_processor(),
        cores=_cores(),
        memory_bytes=_memory_bytes(),
        python=platform.python_version(),
        wired_limit_bytes=_wired_limit_bytes(),
    )


def _sysctl(name: str) -> str:
    """Return a value of macOS's sysctl, or an empty string."""
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    name = ""
    if sys.platform == "darwin":
        name = _sysctl("machdep.cpu.brand_string")
    elif CPU_INFO.exists():
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    return name or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int:
    physical = _sysctl("hw.memsize") if sys.platform == "darwin" else ""
    if physical.isdigit():
        memory_bytes = int(physical)
    else:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_cgroup_limit(path) for path in CGROUP_MEMORY_LIMITS]
    return min([memory_bytes, *(limit for limit in limits if limit is not None)])


def _wired_limit_bytes() -> int:
    """Return macOS's `iogpu.wired_limit_mb` in bytes; 0 is the system's own choice."""
    text = _sysctl("iogpu.wired_limit_mb") if sys.platform == "darwin" else ""
    return int(text) << 20 if text.isdigit() else 0


def _cgroup_limit(path: Path) -> int | None:
    """Return a container's memory limit in bytes, or None where there is none."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdigit() and int(text) > 0 else None


def free_disk_bytes(path: Path) -> int:
    """Return the free bytes of the disk under `path`, which need not exist yet."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free
