"""The models a run produced, verified and ready to leave: for install, serve and publish.

Does: find the folders of a column; check that the run is finished, passed its gates, and that its
files are unchanged. Needs the run folder alone, not its rows or suites.
Does not: load a model, or change anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault, GateFailed, RunError
from mlx_ft.runs.folder import Manifest, read_manifest
from mlx_ft.runs.names import KEPT_STAGES
from mlx_ft.system.files import file_sha256, read_json

FINISH = "run the recipe again, it goes on where it was"


@dataclass(frozen=True)
class RunModels:
    """A run folder with its record (run.json) and the resolved values of its recipe."""

    folder: Path
    record: Mapping[str, Any]
    recipe: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def enable_thinking(self) -> bool:
        return bool(self.recipe["chat"]["enable_thinking"])

    @property
    def date(self) -> str:
        return str(self.recipe["chat"]["date"])

    def manifest(self, stage: str) -> Manifest:
        """Return a stage's manifest. Raises RunError if the stage is not whole."""
        manifest = read_manifest(self.folder / stage)
        if manifest is None:
            raise RunError(Fault(str(self.folder / stage), "not there, or not whole", FINISH))
        return manifest


@dataclass(frozen=True)
class ExportedModel:
    """One model folder of a finished run: its files by name, and their bytes in all.

    `sha256` has the sum of each file as the export's manifest recorded it.
    """

    run: RunModels
    column: str
    folder: Path
    sha256: Mapping[str, str]
    size_bytes: int


def read_run(run: Path) -> RunModels:
    """Return the record and the recipe of a run folder, which both must be readable.

    Stricter than `is_run`: without the model's folder and the chat format no model can be opened.
    Raises RunError.
    """
    folder = run.resolve()
    try:
        record = read_json(folder / "run.json")
        recipe = read_json(folder / "recipe.json")["recipe"]
        made = RunModels(folder, dict(record), dict(recipe))
        _ = made.enable_thinking, made.date, record["model"]["path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = "holds no readable run" if folder.is_dir() else "no such folder"
        raise RunError(
            Fault(str(run), found, "name a folder under runs/, as `ls runs` shows")
        ) from error
    return made


def column_folders(made: RunModels, column: str) -> tuple[Path, Path | None]:
    """Return (model folder, adapter folder or None) of a column. Raises RunError if missing."""
    if column in ("base", "adapter"):
        base = Path(made.record["model"]["path"])
        if not (base / "config.json").exists():
            raise RunError(
                Fault(str(base), "the base model is no longer there", f"{FINISH} and fetches it")
            )
        if column == "base":
            return base, None
        made.manifest("train")
        return base, made.folder / "train" / "adapter"
    return _export_folder(made, column), None


def _export_folder(made: RunModels, column: str) -> Path:
    entry = made.manifest("export").info.get(column)
    folder = made.folder / "export" / str(entry["path"]) if isinstance(entry, Mapping) else None
    if folder is None or not folder.is_dir():
        fix = "set export.keep_fused: true and run again" if column == "fused" else FINISH
        raise RunError(Fault(str(made.folder / "export"), f"has no {column} model", fix))
    return folder


def require_finished(made: RunModels) -> None:
    """Raise unless every stage is whole and every gate was passed.

    GateFailed when a gate stopped the run, RunError when it is not complete.
    """
    status, reason = made.record.get("status"), made.record.get("exit_reason")
    if status == "gate_failed":
        raise GateFailed(
            Fault(
                made.name,
                f"a gate stopped this run ({reason})",
                f"read {made.folder / 'report.html'}, change the recipe and run it again",
            )
        )
    if status != "done":
        raise RunError(Fault(made.name, f"is not finished (its status is {status})", FINISH))
    for stage in KEPT_STAGES:
        made.manifest(stage)
    failed = [
        Fault(f"{made.name}: {check['check']}", str(check["measured"]), "export it again")
        for check in made.manifest("export").info["checks"]
        if not check["ok"]
    ]
    if failed:
        raise GateFailed(failed)


def exported_model(run: Path, column: str) -> ExportedModel:
    """Return a finished run's `quantized` or `fused` model.

    Raises GateFailed or RunError when the run may not leave, or has no such model.
    """
    made = read_run(run)
    require_finished(made)
    folder = _export_folder(made, column)
    prefix = f"{folder.name}/"
    entries = {
        name.removeprefix(prefix): entry
        for name, entry in made.manifest("export").files.items()
        if name.startswith(prefix)
    }
    sha256 = {name: str(entry["sha256"]) for name, entry in entries.items()}
    size_bytes = sum(int(entry["bytes"]) for entry in entries.values())
    return ExportedModel(made, column, folder, sha256, size_bytes)


def require_unchanged(model: ExportedModel, folder: Path | None = None) -> None:
    """Raise RunError for every file that differs from the verified one.

    folder: a copy to check instead of the run.
    """
    place = model.folder if folder is None else folder
    faults = [
        Fault(
            str(place / name),
            "its content is not what the export verified",
            f"delete {model.run.folder / 'export'} and run the recipe again",
        )
        for name, sha256 in model.sha256.items()
        if file_sha256(place / name) != sha256
    ]
    if faults:
        raise RunError(faults)
