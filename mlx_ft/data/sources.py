"""Find files, hash them, and hold out validation rows.

Does not: render, or judge rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlx_ft.data.field_mapping import RowKeys
from mlx_ft.data.files import READERS
from mlx_ft.data.hub import fetched_folder
from mlx_ft.data.lint import without_hits
from mlx_ft.data.problems import Problem
from mlx_ft.data.replay import prompts_sha256
from mlx_ft.data.rows import FileRows, LeftOut, Row, read_rows, said, said_by_system
from mlx_ft.errors import DataError, Fault
from mlx_ft.recipe.schema import DataRecipe
from mlx_ft.system.files import file_sha256
from mlx_ft.text.near_duplicates import earlier_twins

SPLITS = ("train", "valid")
# Raise the number whenever the same rows would be written differently: older runs are then redone.
FORMAT_VERSION = 5
MISSING_FIX = MappingProxyType(
    {
        "train": "write the training rows there, one JSON object a line",
        "valid": "hold out about one in ten rows into it, or set data.holdout: 0.1",
    }
)


def folder_of(data: DataRecipe) -> Path:
    """Return the recipe's folder, which may begin with `~`.

    A dataset of the Hub is fetched if it is not there yet.
    """
    if data.from_hub:
        return fetched_folder(data)
    return Path(os.path.expanduser(data.path))  # leaves an unknown ~user alone, pathlib raises


def api_file(data: DataRecipe) -> Path | None:
    """Return the recipe's list of functions, whose path may begin with `~` as well."""
    return None if data.tool_api is None else Path(os.path.expanduser(data.tool_api))


def files_of(folder: Path, split: str) -> list[Path]:
    """Return the files that a split's rows may be in; more than one is a mistake."""
    return [path for ending in READERS if (path := folder / f"{split}{ending}").is_file()]


def source_files(data: DataRecipe) -> dict[str, Path]:
    """Return the file of each split that has one; DataError when the folder or one is missing, or
    a file is there that `data.holdout` would take the place of.
    """
    folder = folder_of(data)
    if not folder.is_dir():
        found = "is a file, not a folder" if folder.is_file() else "there is no such folder"
        fix = "set data.path to a folder with train.jsonl and valid.jsonl"
        raise DataError(Fault(str(folder), found, fix))
    there = {split: files_of(folder, split) for split in SPLITS}
    needed = SPLITS if data.holdout is None else ("train",)
    faults = [
        Fault(str(folder / f"{split}.jsonl"), "there is no such file", MISSING_FIX[split])
        for split in needed
        if not there[split]
    ]
    faults += [
        Fault(str(files[0]), f"{files[1].name} is there as well", "keep one of them")
        for files in there.values()
        if len(files) > 1
    ]
    if data.holdout is not None and there["valid"]:
        fix = "remove it, or data.holdout"
        faults.append(Fault(str(there["valid"][0]), "is there beside data.holdout", fix))
    if faults:
        raise DataError(faults)
    return {split: files[0] for split, files in there.items() if files}


def data_inputs(data: DataRecipe) -> dict[str, Any]:
    """Return what the data stage depends on beside recipe and model: its source files' sha256.

    Raises DataError when one is missing or cannot be read.
    """
    files = dict(source_files(data))
    if (api := api_file(data)) is not None:
        files["tool_api"] = api
    sources = {name: sha256_of(path) for name, path in files.items()}
    if data.replay is not None:
        sources["replay"] = prompts_sha256()
    return {"format": FORMAT_VERSION, "sources": sources}


def sha256_of(path: Path) -> str:
    """Return a source file's sha256; DataError when it cannot be read."""
    try:
        return file_sha256(path)
    except OSError as error:
        found = f"cannot be read ({error.strerror or error})"
        raise DataError(Fault(str(path), found, "check the file")) from error


def read_splits(data: DataRecipe) -> dict[str, FileRows]:
    """Return the rows of both splits, with all that is wrong with them: as many of each as
    `data.limit` says, once rows are held out. Raises DataError when a file is missing.
    """
    files, keys = source_files(data), RowKeys.of(data)
    read = {split: without_dropped(read_rows(path, keys), data) for split, path in files.items()}
    if data.holdout is not None and "valid" not in read:
        rest, held = hold_out(read["train"].rows, data.holdout, data.holdout_seed)
        whole = read["train"]
        read = {
            "train": replace(whole, rows=tuple(rest)),
            "valid": FileRows(whole.path, tuple(held), ()),
        }
    return {split: replace(file, rows=file.rows[: data.limit]) for split, file in read.items()}


def without_dropped(file: FileRows, data: DataRecipe) -> FileRows:
    """Return a file's rows without those that rules of `data.drop` hit."""
    if not data.drop or file.problems:
        return file
    rows, taken = without_hits(file.rows, data.drop)
    gone = tuple(LeftOut(f"hit by {rule}", tuple(lines)) for rule, lines in taken.items())
    problems = file.problems
    if not rows:
        found = "data.drop leaves out every row"
        problems = (Problem(file.path, None, "empty", found, "drop fewer"),)
    return replace(file, rows=tuple(rows), problems=problems, left_out=(*file.left_out, *gone))


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Return (rows to train, rows held out), each in file order.

    A row's side depends on what the first of its family says and on the seed: rows that are equal
    or nearly so are a family, and on one side. Rows that are added at the end change no side.
    """
    systems, texts = [said_by_system(row) for row in rows], [said(row) for row in rows]
    wholes = [f"{system}\n{text}" for system, text in zip(systems, texts, strict=True)]
    first_of: dict[str, int] = {}
    drawn: set[str] = set()
    held: list[bool] = []
    for index, twin in enumerate(earlier_twins(texts, systems)):
        first = twin if twin is not None else first_of.setdefault(wholes[index], index)
        if first < index:
            held.append(held[first])
            continue
        # Families that say the same under other systems are drawn apart, by the system too.
        by = wholes[index] if texts[index] in drawn else texts[index]
        drawn.add(texts[index])
        held.append(_draw(by, seed) < share)
    return (
        [row for row, out in zip(rows, held, strict=True) if not out],
        [row for row, out in zip(rows, held, strict=True) if out],
    )


def _draw(text: str, seed: int) -> float:
    """Return a number from 0 to 1 that depends on the text and the seed alone."""
    digest = hashlib.blake2b(f"{seed}\n{text}".encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
