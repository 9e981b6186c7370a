"""Datasets of the Hub, fetched once into the user's cache as JSON lines.

Does: pin the revision to a commit, and fetch the splits of a recipe with the `datasets` package.
Does not: look at the rows, or run a dataset's code.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_ft.data.files import without_nulls
from mlx_ft.errors import DataError, Fault
from mlx_ft.recipe.data import HUB_PREFIX
from mlx_ft.recipe.schema import DataRecipe
from mlx_ft.system.cache import cache_home
from mlx_ft.system.files import hash_of, write_json

# Raised when the same dataset would be written differently; it is then fetched again.
FETCH_VERSION = 1
SOURCE_FILE = "source.json"
HF_FIX = "install it with: pip install 'mlx-ft[hf]'"


def fetched_folder(data: DataRecipe) -> Path:
    """Return the folder with the rows of a recipe's dataset, which is fetched if it is not there.

    A dataset that is there is not asked for again: remove its folder for a newer one. Raises
    DataError when it cannot be had.
    """
    name, hf = data.path.removeprefix(HUB_PREFIX), data.hf
    asked = [FETCH_VERSION, name, *hf.model_dump().values()]
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[-60:]
    folder = cache_home() / "datasets" / f"{slug}-{hash_of(asked)[:16]}"
    if (folder / SOURCE_FILE).exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{slug}-", dir=folder.parent) as unfinished:
        _fetch(data, name, Path(unfinished) / "rows")
        if not folder.exists():  # another run may have been faster
            (Path(unfinished) / "rows").rename(folder)
    return folder


def _fetch(data: DataRecipe, name: str, folder: Path) -> None:
    try:
        import datasets
    except ImportError as error:
        found = "rows of the Hub need the package datasets"
        raise DataError(Fault(data.path, found, HF_FIX)) from error
    splits = {"train": data.hf.train_split, "valid": data.hf.valid_split}
    folder.mkdir()
    try:
        revision = _commit(name, data.hf.revision)
        for split, of_hub in splits.items():
            if of_hub is not None:
                rows = datasets.load_dataset(name, data.hf.config, split=of_hub, revision=revision)
                _write_lines(folder / f"{split}.jsonl", rows)
    except Exception as error:  # the package passes on whatever its readers and the network raise
        (said, *_) = str(error).splitlines() or [type(error).__name__]
        fix = "check its name, data.hf and the network"
        raise DataError(Fault(data.path, f"cannot be fetched ({said})", fix)) from error
    write_json(folder / SOURCE_FILE, {"dataset": name, "commit": revision, **data.hf.model_dump()})


def _commit(name: str, revision: str | None) -> str | None:
    """Return the commit that a revision stands for now; None for a folder on this disk."""
    if Path(name).is_dir():
        return None
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name, revision=revision).sha


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            # Dates and the like, which JSON does not have, become texts.
            line = json.dumps(without_nulls(dict(row)), ensure_ascii=False, default=str)
            stream.write(f"{line}\n")
