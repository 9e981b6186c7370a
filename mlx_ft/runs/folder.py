"""Stage folders that are complete or absent; manifests; run.json.

Does: name run folders and tell them from other folders. Write a stage into `<stage>.tmp`, flush it,
write its manifest last, rename. Tell whether a stage is complete for given inputs.
Does not: know the content of a stage.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault, RunError
from mlx_ft.runs.names import KEPT_STAGES, StageName
from mlx_ft.system.files import file_sha256, flush_to_disk, read_json, write_json

MANIFEST = "manifest.json"
SCHEMA = 1
# Files of the run itself, outside of its stages' folders.
OWN_FILES = ("run.json", "recipe.json", "preflight.json")


@dataclass(frozen=True)
class Manifest:
    """Manifest of a complete stage folder.

    stage: name of the stage.
    inputs: hash of everything the stage depends on.
    files: relative path -> {"sha256", "bytes"}.
    info: results that the stage hands on (plain JSON).
    """

    stage: str
    inputs: str
    files: Mapping[str, Mapping[str, Any]]
    info: Mapping[str, Any]


def seal(folder: Path, stage: str, inputs: str, info: Mapping[str, Any]) -> Manifest:
    """Flush every file of `folder` and write its manifest last, which makes it complete.

    Temporary files of killed processes (see `replacing`) are deleted first.
    """
    for left in [path for path in folder.rglob(".*.tmp") if path.is_file()]:
        left.unlink()
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = path.relative_to(folder).as_posix()
        if relative == MANIFEST:
            continue
        flush_to_disk(path)
        files[relative] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    for directory in [p for p in folder.rglob("*") if p.is_dir()]:
        flush_to_disk(directory)
    manifest = Manifest(stage, inputs, files, dict(info))
    write_json(folder / MANIFEST, {"schema": SCHEMA, **vars(manifest)})
    flush_to_disk(folder)
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a complete stage folder, or None when there is none to trust.

    Sizes are compared, not hashes: a folder is hashed when it is written and by `verify_files`.
    """
    try:
        value = read_json(folder / MANIFEST)
        if value["schema"] != SCHEMA:
            return None
        manifest = Manifest(value["stage"], value["inputs"], value["files"], value["info"])
        whole = all(
            (folder / name).stat().st_size == entry["bytes"] and isinstance(entry["sha256"], str)
            for name, entry in manifest.files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if whole else None


def forget_files(folder: Path, under: str) -> None:
    """Remove files, and the entries of info about them, from a stage's manifest.

    Then they can be deleted and the stage stays complete. A folder without a valid manifest stays
    unchanged.
    under: relative path of a file, or of a folder with all its files.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    kept = {
        name: entry
        for name, entry in manifest.files.items()
        if name != under and not name.startswith(f"{under}/")
    }
    info = {
        key: None if isinstance(value, dict) and value.get("path") == under else value
        for key, value in manifest.info.items()
    }
    left = replace(manifest, files=kept, info=info)
    write_json(folder / MANIFEST, {"schema": SCHEMA, **vars(left)})
    flush_to_disk(folder)


def verify_files(folder: Path) -> list[Fault]:
    """Return a fault for every file of a stage whose content differs from its manifest."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [Fault(str(folder), "no valid manifest", "delete the folder and run again")]
    return [
        Fault(str(folder / name), "content differs from its manifest", "delete the stage's folder")
        for name, entry in manifest.files.items()
        if file_sha256(folder / name) != entry["sha256"]
    ]


def complete_stage(run: Path, stage: str, inputs: str) -> Manifest | None:
    """Return the manifest of `run/stage` if it is complete and was made from these inputs."""
    manifest = read_manifest(run / stage)
    if manifest is None or manifest.stage != stage or manifest.inputs != inputs:
        return None
    return manifest


@contextlib.contextmanager
def writing_stage(run: Path, stage: str, *, keep_partial: bool = False) -> Iterator[Path]:
    """Yield `<run>/<stage>.tmp` to write into. The caller seals it; then it takes its final name.

    keep_partial: keep the remains of an earlier attempt, for a stage that can continue them.
    On an error the partial folder stays, for inspection. Without a manifest it does not count.
    """
    partial = run / f"{stage}.tmp"
    if partial.exists() and not keep_partial:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    yield partial
    assert (partial / MANIFEST).exists(), f"stage {stage} was not sealed"
    final = run / stage
    if final.exists():
        shutil.rmtree(final)
    partial.replace(final)
    flush_to_disk(run)


def taken_over(run: Path, stage: str, inputs: str) -> Path | None:
    """Copy a stage from a neighbouring run that completed it from the same inputs.

    Return that run, or None if there is none.
    """
    for other in sorted(run.parent.iterdir()):
        if other == run or complete_stage(other, stage, inputs) is None:
            continue
        if verify_files(other / stage):
            continue
        with writing_stage(run, stage) as folder:
            shutil.copytree(other / stage, folder, dirs_exist_ok=True)
        return other
    return None


def run_folder(runs_root: Path, recipe_name: str, identity: str) -> Path:
    """Return (and make) `<runs_root>/<recipe name>-<8 hex of identity>`.

    Raises RunError when it cannot be written or would lie outside `runs_root`.
    """
    folder = runs_root / f"{recipe_name}-{identity[:8]}"
    if folder.resolve().parent != runs_root.resolve():
        raise RunError(Fault(str(folder), "lies outside the runs folder", "choose another name"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(
            Fault(str(folder), f"cannot be written ({error.strerror})", "choose --runs FOLDER")
        ) from error
    return folder


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run folder, whole or broken.

    One of these files is enough, since a run may have lost the others: run.json, recipe.json,
    preflight.json, or the manifest of a stage that names this stage.
    A folder called data or train is not enough, nor is recipe.yaml: those may be the user's own.
    """
    # os.path: a folder that may not be read is no run, and no error.
    return any(os.path.isfile(folder / name) for name in OWN_FILES) or any(
        _names_stage(folder / stage / MANIFEST, stage) for stage in KEPT_STAGES
    )


def _names_stage(manifest: Path, stage: StageName) -> bool:
    try:
        return bool(read_json(manifest)["stage"] == stage)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def no_run(folder: Path) -> Fault:
    """Return the fault of a folder that is named as a run and is none."""
    found = "holds nothing of a run" if folder.is_dir() else "no such folder"
    return Fault(str(folder), found, "name a run folder, as `mlx-ft runs` lists them")


def update_record(run: Path, **changes: Any) -> dict[str, Any]:
    """Merge `changes` into `run.json` and return it. `stages` is merged one level deeper."""
    path = run / "run.json"
    try:
        record = read_json(path)
    except (OSError, ValueError):
        record = {"schema": SCHEMA, "run": run.name, "created": time.time(), "stages": {}}
    stages = {**record.get("stages", {}), **changes.pop("stages", {})}
    record.update(changes, stages=stages, updated=time.time())
    write_json(path, record)
    return dict(record)
