"""`mlx-ft install --lm-studio`: put a finished run's model into LM Studio's models folder.

Does: find that folder, copy (or link) a verified model into it; the model appears complete or not
at all. Does not: overwrite another run's model, or start LM Studio.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from mlx_ft.errors import Fault, RunError
from mlx_ft.runs.models import ExportedModel, exported_model, require_unchanged
from mlx_ft.system.console import Console
from mlx_ft.system.files import flush_to_disk, read_json, write_json
from mlx_ft.system.hardware import free_disk_bytes
from mlx_ft.text.quantities import format_bytes

PUBLISHER = "mlx-ft"
# Records which run a copied folder belongs to; LM Studio ignores it.
MARKER = "mlx-ft.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


def require_name(name: str) -> str:
    """Return `name` if it can name a model and a folder; RunError otherwise."""
    if not NAME.fullmatch(name):
        raise RunError(
            Fault(f"--name {name}", "cannot name a model", "use letters, digits and . _ -")
        )
    return name


def lm_studio_models(home: Path) -> Path | None:
    """Return LM Studio's models folder of the user with this home; None without LM Studio.

    Newer versions name their folder in a pointer file; older ones have one of two fixed places.
    """
    places = [home / ".lmstudio", home / ".cache" / "lm-studio"]
    try:
        pointer = (home / ".lmstudio-home-pointer").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        pointer = ""
    if pointer:
        places.insert(0, Path(pointer))
    place = next((each for each in places if each.is_dir()), None)
    return None if place is None else _configured_models(place) or place / "models"


def _configured_models(place: Path) -> Path | None:
    """Return the models folder from LM Studio's settings, if it exists."""
    try:
        chosen = Path(read_json(place / "settings.json")["downloadsFolder"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return chosen if chosen.is_absolute() and chosen.is_dir() else None


def install_lm_studio(
    run: Path,
    *,
    column: str,
    name: str | None,
    models_folder: Path | None,
    link: bool,
    console: Console,
) -> Iterator[str]:
    """Put a run's model into LM Studio's models folder; yield result lines.

    Raises GateFailed or RunError when the run is not ready, RunError when there is no LM Studio,
    the name belongs to another model, or the disk is full.
    """
    model = exported_model(run, column)
    models = models_folder or lm_studio_models(Path.home())
    if models is None:
        raise RunError(
            Fault("LM Studio", "no models folder found", "start it once, or give --models-folder")
        )
    shown = require_name(name or f"{model.run.name}-{model.folder.name}")
    target = models.expanduser().absolute() / PUBLISHER / shown
    _require_ours(target, model)
    try:
        _link(model, target) if link else _copy(model, target, console)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(
            Fault(
                str(target), f"cannot be written ({reason})", "free some space, or --models-folder"
            )
        ) from error
    for note in _notes(model):
        console.say(note, "yellow")
    yield f"model    {target} ({format_bytes(model.size_bytes)}{', linked' if link else ''})"
    yield f"next     in LM Studio, choose {PUBLISHER}/{shown} under My Models"


def _notes(model: ExportedModel) -> Iterator[str]:
    if sys.platform != "darwin":
        yield "LM Studio runs MLX models on Macs with Apple silicon only"
    mode = "on" if model.run.enable_thinking else "off"
    templates = (model.folder / file for file in TEMPLATE_FILES)
    if any("enable_thinking" in each.read_text("utf-8") for each in templates if each.exists()):
        yield f"the model was trained and measured with thinking {mode}: set it so in LM Studio too"


def _require_ours(target: Path, model: ExportedModel) -> None:
    """Raise RunError when `target` holds anything but this run's model."""
    if not os.path.lexists(target):
        return
    if target.is_symlink():
        ours = target.resolve().parent.parent == model.run.folder
    else:
        try:
            ours = read_json(target / MARKER)["run"] == model.run.name
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
    if not ours:
        raise RunError(
            Fault(str(target), "holds another model", "give another --name, or remove it first")
        )


def _link(model: ExportedModel, target: Path) -> None:
    require_unchanged(model)
    fresh = _fresh_place(target)
    fresh.symlink_to(model.folder, target_is_directory=True)
    _replace(fresh, target)


def _copy(model: ExportedModel, target: Path, console: Console) -> None:
    """Copy the model's files beside `target`, verify their hashes, then move them there."""
    free_bytes = free_disk_bytes(target)
    if free_bytes < model.size_bytes:
        found = f"the copy needs {format_bytes(model.size_bytes)}, {format_bytes(free_bytes)} free"
        raise RunError(Fault(str(target), found, "free some space, or use --link"))
    fresh = _fresh_place(target)
    fresh.mkdir()
    try:
        with console.progress("copying", len(model.sha256)) as progress:
            for done, name in enumerate(model.sha256, start=1):
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(model.folder / name, fresh / name)
                flush_to_disk(fresh / name)
                progress.update(done, name)
        require_unchanged(model, fresh)
        write_json(fresh / MARKER, {"run": model.run.name, "column": model.column})
        flush_to_disk(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _replace(fresh, target)


def _fresh_place(target: Path) -> Path:
    """Return an empty path beside `target` to write to; remains of an earlier attempt go."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.tmp")
    _remove(fresh)
    return fresh


def _replace(fresh: Path, target: Path) -> None:
    """Move `fresh` to `target`; the old content is moved aside first, and removed last."""
    old = target.with_name(f".{target.name}.old")
    _remove(old)
    if os.path.lexists(target):
        target.rename(old)
    fresh.rename(target)
    flush_to_disk(target.parent)
    _remove(old)


def _remove(place: Path) -> None:
    if place.is_symlink() or place.is_file():
        place.unlink()
    elif place.exists():
        shutil.rmtree(place)
