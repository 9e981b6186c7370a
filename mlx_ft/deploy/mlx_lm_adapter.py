"""Leave a finished adapter where mlx-lm expects it: at the `adapter_path` of an mlx-lm config.

Does not: overwrite anything but an adapter, or leave an incomplete one, or the weights of one
adapter beside the config of another.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mlx_ft.errors import Fault, RunError
from mlx_ft.system.files import flush_to_disk

ADAPTER_FILES = ("adapters.safetensors", "adapter_config.json")


def require_deliverable(target: Path) -> None:
    """Raise RunError when `target` holds anything but an earlier adapter, or cannot be written."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise RunError(Fault(str(target), "is not a plain folder", "change adapter_path"))
    foreign = (
        [path.name for path in target.iterdir() if not _is_adapter_file(path.name)]
        if target.exists()
        else []
    )
    if foreign:
        raise RunError(
            Fault(
                str(target),
                f"holds other files ({', '.join(sorted(foreign)[:3])})",
                "change adapter_path to a new folder",
            )
        )
    place = target
    while not place.exists():
        place = place.absolute().parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise RunError(Fault(str(target), "cannot be written", "change adapter_path"))


def _is_adapter_file(name: str) -> bool:
    # mlx-lm also leaves numbered copies such as 0000100_adapters.safetensors. A delivery that was
    # killed leaves its unfinished file.
    unfinished = name in map(_unfinished, ADAPTER_FILES)
    return name in ADAPTER_FILES or name.endswith("_adapters.safetensors") or unfinished


def _unfinished(name: str) -> str:
    return f".{name}.tmp"


def deliver_adapter(adapter: Path, target: Path) -> None:
    """Copy the adapter's two files to `target`; each appears complete, the config last.

    An earlier adapter's config is removed first: until the new one exists, nothing can be loaded.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in ADAPTER_FILES:
        fresh = target / _unfinished(name)
        shutil.copyfile(adapter / name, fresh)
        flush_to_disk(fresh)
    weights, config = ADAPTER_FILES
    (target / config).unlink(missing_ok=True)
    for name in (weights, config):
        (target / _unfinished(name)).replace(target / name)
    flush_to_disk(target)
