"""Resolve a model name to a folder on this disk and a pinned revision.

Does: find built-in names, Hub ids and local folders. Pin a Hub revision to a commit. Refuse unsafe
or incomplete folders.
Does not: load weights (`engine/load.py`), import MLX, or run a model's code.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault, ModelError
from mlx_ft.model.builtin import BUILTIN_MODELS, ensure_builtin
from mlx_ft.system.cache import cache_home
from mlx_ft.system.console import Console
from mlx_ft.system.files import file_sha256, hash_of, read_json

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Everything a model needs and nothing that could be executed.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken", "README.md")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this disk.

    name: as it was asked for.
    source: builtin, hub or local.
    revision: a commit (hub) or a content hash (the others).
    size_bytes: of the safetensors files.
    """

    name: str
    path: Path
    source: str
    revision: str
    config: Mapping[str, Any]
    size_bytes: int

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "unknown"))

    @property
    def identity(self) -> str:
        """Return the hash that stands for the model's weights and tokenizer in stage inputs."""
        return identity_of(self.source, self.name, self.revision)

    def info(self) -> dict[str, Any]:
        """Return the record of the model that a run keeps (plain JSON)."""
        record = asdict(self) | {"path": str(self.path), "model_type": self.model_type}
        record["quantization"] = self.config.get("quantization")
        del record["config"]
        return record


def identity_of(source: str, name: str, revision: str) -> str:
    """Return the hash that stands for a model; see `ResolvedModel`."""
    return hash_of([source, name if source == "hub" else "", revision])


def _folder_faults(folder: Path, config: Mapping[str, Any]) -> list[Fault]:
    faults = []
    weights = {path.name for path in folder.glob("*.safetensors")}
    missing = sorted(_indexed_files(folder) - weights)
    if weights and missing:
        found = f"{len(missing)} of its weight files are missing ({', '.join(missing[:3])})"
        faults.append(Fault(str(folder), found, "download it again"))
    if not weights:
        other = [p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".gguf", ".npz"}]
        names = ", ".join(sorted(other)[:3])
        found = f"has no safetensors, only {names}" if other else "has no weights"
        faults.append(Fault(str(folder), found, "use a folder with *.safetensors files"))
    if config.get("model_file"):
        # It makes mlx-lm import a Python file from the model folder (GHSA-9m9w-53g9-47c4).
        faults.append(
            Fault(
                str(folder / "config.json"),
                f"asks to run its own code (model_file: {config['model_file']})",
                "use a model of an architecture that mlx-lm has",
            )
        )
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        faults.append(Fault(str(folder), "no tokenizer files", "use a complete model folder"))
    return faults


def _indexed_files(folder: Path) -> set[str]:
    """Return the weight files that the folder's index names; none where there is no index."""
    try:
        index = read_json(folder / "model.safetensors.index.json")
        return {str(name) for name in index["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model folder's config.json; ModelError when it is missing or broken."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            Fault(str(path), "not found", "give the folder of an MLX or Hugging Face model")
        ) from error
    except ValueError as error:
        raise ModelError(Fault(str(path), f"not JSON ({error})", "download it again")) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(Fault(str(path), "has no model_type", "use a language model's folder"))
    return config


def _content_revision(folder: Path) -> str:
    """Return a hash of a local folder: small files by content, weights by header, size, time."""
    parts: list[list[Any]] = []
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        if path.suffix in {".json", ".jinja", ".txt", ".model"}:
            parts.append([path.name, file_sha256(path)])
        elif path.suffix == ".safetensors":
            stat = path.stat()
            with path.open("rb") as stream:
                header = stream.read(1 << 16)
            parts.append([path.name, stat.st_size, stat.st_mtime_ns, hash_of(header.hex())])
    return hash_of(parts)


def _local(name: str, folder: Path, source: str, revision: str | None) -> ResolvedModel:
    config: dict[str, Any] = {}
    faults: list[Fault] = []
    try:
        config = read_config(folder)
    except ModelError as error:
        faults.extend(error.faults)
    faults.extend(_folder_faults(folder, config))
    if faults:
        raise ModelError(faults)
    size_bytes = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    return ResolvedModel(
        name, folder, source, revision or _content_revision(folder), config, size_bytes
    )


def _from_hub(name: str, revision: str | None, console: Console) -> ResolvedModel:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    patterns = list(HUB_FILES)
    try:
        # An exact commit that is already here needs no network at all.
        found = snapshot_download(
            name, revision=revision, allow_patterns=patterns, local_files_only=True
        )
    except (LocalEntryNotFoundError, OSError, ValueError):
        found = ""
    if not (found and revision == Path(found).name and not _folder_faults(Path(found), {})):
        console.say(f"model {name}: looking it up on the Hugging Face Hub")
        try:
            found = snapshot_download(name, revision=revision, allow_patterns=patterns)
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else "no answer"
            raise ModelError(
                Fault(
                    f"model {name}",
                    f"the Hub does not give it out ({status})",
                    "check the name and revision, or log in with `hf auth login`",
                )
            ) from error
        except HFValidationError as error:
            raise ModelError(
                Fault(f"model {name}", f"not a Hub id ({error})", "check the name")
            ) from error
        except (LocalEntryNotFoundError, OSError) as error:
            if not found:
                raise ModelError(
                    Fault(
                        f"model {name}",
                        "not a local folder, not cached, and the Hub cannot be reached",
                        f"check the name, go online once, or use a built-in model "
                        f"({', '.join(sorted(BUILTIN_MODELS))})",
                    )
                ) from error
            console.say(f"model {name}: the Hub cannot be reached, using the cached copy")
    folder = Path(found)
    return _local(name, folder, "hub", folder.name)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long for a file is none
        return False


def resolve_model(name: str, revision: str | None, console: Console) -> ResolvedModel:
    """Return the model called `name`, fetched if need be; slow steps are narrated.

    A built-in name wins, then an existing local folder, then a Hub id. Raises ModelError.
    """
    if name in BUILTIN_MODELS:
        folder = ensure_builtin(name, cache_home(), console)
        return _local(name, folder, "builtin", BUILTIN_MODELS[name].file_sha256)
    folder = Path(os.path.expanduser(name))  # leaves an unknown ~user alone, pathlib raises
    if name and _is_folder(folder):
        return _local(name, folder.resolve(), "local", None)
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        raise ModelError(
            Fault(
                f"model {name}",
                "no such folder, and not a Hub id (owner/name)",
                f"check the path, or use a built-in model ({', '.join(sorted(BUILTIN_MODELS))})",
            )
        )
    return _from_hub(name, revision, console)
