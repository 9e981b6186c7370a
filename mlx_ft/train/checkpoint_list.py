"""List the complete checkpoints of a run. MLX-free, because the supervisor asks too."""

from __future__ import annotations

from pathlib import Path

from mlx_ft.runs.folder import read_manifest

CHECKPOINTS = "checkpoints"


def complete_checkpoints(folder: Path, inputs: str) -> list[Path]:
    """Return the valid checkpoints made from these inputs, oldest first."""
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.isdigit():
            manifest = read_manifest(path)
            if manifest is not None and manifest.inputs == inputs:
                found.append(path)
    return found
