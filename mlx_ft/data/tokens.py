"""TokenizedSplit: the tokenized dataset on disk, written here and read by the training.

Does: hold a split in flat arrays; write, read and check it as safetensors. Group rows of similar
length, and pad them.
Does not: tokenize, choose training batches or import MLX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mlx_ft.errors import Fault, RunError

Ids = npt.NDArray[np.int32]
Flags = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]

# `weights` is there only when some token weighs other than 1.
DTYPES = {
    "weights": np.float32,
    "ids": np.int32,
    "trained": np.uint8,
    "offsets": np.int64,
    "line": np.int32,
}


@dataclass(frozen=True, eq=False)
class TokenizedSplit:
    """The rows of one split, one after the other; row i is [offsets[i], offsets[i + 1]).

    ids: int32 [tokens]. trained: uint8 [tokens], 1 where the token is a target of the loss; the
    first token of a row never is, since nothing predicts it. offsets: int64 [rows + 1].
    lines: int32 [rows], the 1-based line of the source file. weights: float32 [tokens], what each
    token weighs in the loss where it is trained; None when that is 1 everywhere.
    """

    ids: Ids
    trained: Flags
    offsets: Offsets
    lines: Ids
    weights: Weights | None = None

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> tuple[Ids, Flags]:
        """Return views of one row's ids and trained flags; `index` from 0 to len - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start, stop = self.offsets[index], self.offsets[index + 1]
        return self.ids[start:stop], self.trained[start:stop]

    def row_weights(self, index: int) -> Weights | None:
        """Return a view of one row's weights, or None when all are 1."""
        if self.weights is None:
            return None
        return self.weights[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> Offsets:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.offsets)


def pack_rows(
    rows: Sequence[tuple[Ids, Flags]],
    lines: Sequence[int],
    weights: Sequence[Weights] | None = None,
) -> TokenizedSplit:
    """Join rows of (ids, trained), their source lines and perhaps their weights into one split."""
    assert len(rows) == len(lines), "every row has one source line"
    lengths = np.array([len(ids) for ids, _ in rows], dtype=np.int64)
    no_ids, no_flags = np.empty(0, np.int32), np.empty(0, np.uint8)
    return TokenizedSplit(
        ids=np.concatenate([no_ids, *(ids for ids, _ in rows)], dtype=np.int32),
        trained=np.concatenate([no_flags, *(trained for _, trained in rows)], dtype=np.uint8),
        offsets=np.concatenate([[0], np.cumsum(lengths)], dtype=np.int64),
        lines=np.array(lines, dtype=np.int32),
        weights=_joined_weights(weights),
    )


def take_rows(split: TokenizedSplit, order: Sequence[int]) -> TokenizedSplit:
    """Return a split's rows in another order."""
    weights = [split.row_weights(index) for index in order]
    return pack_rows(
        [split.row(index) for index in order],
        [int(split.lines[index]) for index in order],
        [each for each in weights if each is not None],
    )


def _joined_weights(weights: Sequence[Weights] | None) -> Weights | None:
    if not weights:
        return None
    joined: Weights = np.concatenate(weights, dtype=np.float32)
    return None if (joined == 1).all() else joined


def group_rows(lengths: Sequence[int] | Offsets, limit_tokens: int) -> list[list[int]]:
    """Return all rows, shortest first, in groups whose padded tokens stay within the limit.

    A row that is longer than the limit is a group of its own.
    """
    groups: list[list[int]] = []
    for row in np.argsort(lengths, kind="stable").tolist():
        if not groups or (len(groups[-1]) + 1) * int(lengths[row]) > limit_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def pad_rows(rows: Sequence[Sequence[int] | Ids]) -> Ids:
    """Return the rows as one array (rows, longest), zero on the right of the shorter ones."""
    padded = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
    for index, ids in enumerate(rows):
        padded[index, : len(ids)] = ids
    return padded


def write_split(path: Path, split: TokenizedSplit) -> None:
    """Write a split as safetensors with the tensors ids, trained, offsets and line.

    Raises RunError when the disk refuses it.
    """
    tensors: dict[str, npt.NDArray[Any]] = {
        "ids": split.ids,
        "trained": split.trained,
        "offsets": split.offsets,
        "line": split.lines,
    }
    if split.weights is not None:
        tensors["weights"] = split.weights
    try:
        save_file(tensors, path)
    except (OSError, SafetensorError) as error:
        raise RunError(
            Fault(str(path), f"cannot be written ({error})", "free some space on that disk")
        ) from error


def read_split(path: Path) -> TokenizedSplit:
    """Read what `write_split` wrote; RunError when the file is missing, broken or foreign."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unusable(path, str(error)) from error
    if set(tensors) | {"weights"} != set(DTYPES):
        raise _unusable(path, f"holds {', '.join(sorted(tensors)) or 'nothing'}")
    for name, dtype in ((n, DTYPES[n]) for n in tensors):
        if tensors[name].dtype != dtype or tensors[name].ndim != 1:
            raise _unusable(path, f"{name} is {tensors[name].dtype} {tensors[name].shape}")
    split = TokenizedSplit(
        ids=tensors["ids"],
        trained=tensors["trained"],
        offsets=tensors["offsets"],
        lines=tensors["line"],
        weights=tensors.get("weights"),
    )
    consistent = (
        len(split.offsets) == len(split.lines) + 1
        and split.offsets[0] == 0
        and split.offsets[-1] == len(split.ids) == len(split.trained)
        and bool((split.lengths >= 0).all())
        and (split.weights is None or len(split.weights) == len(split.ids))
    )
    if not consistent:
        raise _unusable(path, "its tensors do not fit together")
    return split


def _unusable(path: Path, reason: str) -> RunError:
    found = f"not a tokenized split ({reason})"
    return RunError(Fault(str(path), found, "delete the run's data folder and run again"))
