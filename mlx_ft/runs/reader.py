"""Read any run folder, whole or broken, and collect all faults.

Does: tell a missing file (normal in an unfinished run) from a broken one (a fault), and a complete
stage from a changed or unfinished one.
Does not: interpret or write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault, RunError
from mlx_ft.runs.folder import MANIFEST, is_run, no_run, read_manifest
from mlx_ft.runs.names import RECORDED_STAGES

COMPLETE, CHANGED, UNFINISHED = "complete", "changed", "unfinished"


def _not_finite(_: str) -> None:
    """Read NaN and Infinity, which JSON does not have, as null."""


class ArtifactReader:
    """Reads one run folder and collects faults. Raises RunError if `run` is no run folder.

    run: the folder.
    faults: all problems so far; `raise_faults` reports them together.
    """

    def __init__(self, run: Path):
        self.run = run
        self.faults: list[Fault] = []
        if not is_run(run):
            raise RunError(no_run(run))

    def raise_faults(self) -> None:
        """Raise RunError with every fault found so far, if there is one."""
        if self.faults:
            raise RunError(self.faults)

    def json(self, relative: str) -> dict[str, Any] | None:
        """Return the JSON object in a file, or None when the file is missing or broken."""
        content = self._content(relative)
        if content is None:
            return None
        try:
            value = json.loads(content.decode(), parse_constant=_not_finite)
        except (ValueError, RecursionError) as error:
            self.broken(relative, f"not valid JSON ({error})")
            return None
        if not isinstance(value, dict):
            self.broken(relative, "holds no JSON object")
            return None
        return value

    def json_lines(self, relative: str) -> list[dict[str, Any]]:
        """Return the objects of a JSONL file. A torn last line (a crash) is left out.

        Only a newline character ends a line: a text may hold U+2028.
        """
        content = self._content(relative)
        if content is None:
            return []
        lines = content.split(b"\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode(), parse_constant=_not_finite)
            except (ValueError, RecursionError) as error:
                if number < len(lines):
                    self.broken(f"{relative}:{number}", f"not valid JSON ({error})")
                continue
            if isinstance(row, dict):
                rows.append(row)
            else:
                self.broken(f"{relative}:{number}", "holds no JSON object")
        return rows

    def folder(self, stage: str) -> str | None:
        """Return the stage's folder, relative to the run: the finished before the partial one."""
        for name in (stage, f"{stage}.tmp"):
            if (self.run / name).is_dir():
                return name
        return None

    def state(self, stage: str) -> str | None:
        """Tell whether a stage is complete, changed since its manifest, unfinished, or None.

        A changed stage has a manifest, but a file is missing or has another size.
        """
        if stage == "preflight":
            return COMPLETE if (self.run / "preflight.json").exists() else None
        folder = self.folder(stage)
        if folder is None:
            return None
        if folder != stage or not (self.run / folder / MANIFEST).exists():
            return UNFINISHED
        return COMPLETE if read_manifest(self.run / folder) is not None else CHANGED

    def manifest_info(self, stage: str) -> dict[str, Any] | None:
        """Return the hand-over of a stage that has a manifest, else None."""
        manifest = self.json(f"{stage}/{MANIFEST}")
        info = manifest.get("info") if manifest else None
        return info if isinstance(info, dict) else None

    def broken(self, relative: str, found: str) -> None:
        """Add a fault about the file `relative`, with the fix for its place."""
        top = relative.split("/")[0].split(":")[0]
        fix = (
            f"delete {self.run / top} and run the recipe again"
            if top.removesuffix(".tmp") in RECORDED_STAGES
            else "restore the file, or run the recipe again with another --runs folder"
        )
        self.faults.append(Fault(str(self.run / relative), found, fix))

    def _content(self, relative: str) -> bytes | None:
        try:
            return (self.run / relative).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self.broken(relative, f"cannot be read ({error.strerror})")
            return None
