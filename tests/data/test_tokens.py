"""A split survives the disk bit for bit, and nothing else is taken for one."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mlx_ft.data.tokens import TokenizedSplit, group_rows, pack_rows, read_split, write_split
from mlx_ft.errors import RunError

rows_of_flagged_ids = st.lists(
    st.lists(st.tuples(st.integers(0, 200_000), st.booleans()), min_size=1, max_size=9), max_size=6
)


def packed(rows: list[list[tuple[int, bool]]]) -> TokenizedSplit:
    arrays = [
        (np.array([i for i, _ in row], np.int32), np.array([t for _, t in row], np.uint8))
        for row in rows
    ]
    return pack_rows(arrays, [2 * number + 1 for number in range(len(rows))])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows_of_flagged_ids)
def test_rows_come_back_from_disk_as_they_were(
    rows: list[list[tuple[int, bool]]], tmp_path: Path
) -> None:
    path = tmp_path / "split.safetensors"
    write_split(path, packed(rows))
    split = read_split(path)
    assert len(split) == len(rows)
    assert split.lengths.tolist() == [len(row) for row in rows]
    assert split.lines.tolist() == [2 * number + 1 for number in range(len(rows))]
    for index, row in enumerate(rows):
        ids, trained = split.row(index)
        assert ids.tolist() == [i for i, _ in row]
        assert trained.tolist() == [int(t) for _, t in row]


def test_rows_are_views_not_copies() -> None:
    split = packed([[(1, False), (2, True)], [(3, True)]])
    assert np.shares_memory(split.row(1)[0], split.ids)


@pytest.mark.parametrize("index", [-1, 2])
def test_there_is_no_row_outside(index: int) -> None:
    with pytest.raises(IndexError):
        packed([[(1, True)], [(2, True)]]).row(index)


def test_the_types_on_disk_are_the_documented_ones(tmp_path: Path) -> None:
    path = tmp_path / "split.safetensors"
    write_split(path, packed([[(1, True)]]))
    types = {name: str(tensor.dtype) for name, tensor in load_file(path).items()}
    assert types == {"ids": "int32", "trained": "uint8", "offsets": "int64", "line": "int32"}


def test_a_missing_or_torn_file_is_a_run_error(tmp_path: Path) -> None:
    path = tmp_path / "split.safetensors"
    with pytest.raises(RunError):
        read_split(path)
    write_split(path, packed([[(1, True), (2, True)]]))
    whole = path.read_bytes()
    for size in (0, 4, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(RunError):
            read_split(path)


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": np.array([0, 3], np.int64)},
        {"offsets": np.array([1, 2], np.int64)},
        {"offsets": np.array([0], np.int64)},
        {"offsets": np.array([0, 2, 1, 2], np.int64), "line": np.zeros(3, np.int32)},
        {"trained": np.zeros(1, np.uint8)},
        {"ids": np.zeros(2, np.int64)},
        {"ids": np.zeros((2, 1), np.int32)},
        {"more": np.zeros(1, np.int32)},
    ],
    ids=lambda change: ",".join(change),
)
def test_tensors_that_do_not_fit_together_are_a_run_error(
    change: dict[str, np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / "split.safetensors"
    write_split(path, packed([[(1, True), (2, True)]]))
    save_file({**load_file(path), **change}, path)
    with pytest.raises(RunError, match="not a tokenized split"):
        read_split(path)


def test_a_folder_that_is_not_there_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        write_split(tmp_path / "none" / "split.safetensors", packed([[(1, True)]]))


@given(
    lengths=st.lists(st.integers(2, 90), min_size=1, max_size=40),
    limit=st.integers(1, 200),
)
def test_groups_hold_every_row_once_within_the_limit(lengths: list[int], limit: int) -> None:
    groups = group_rows(np.array(lengths), limit)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= limit
    in_order = [lengths[row] for group in groups for row in group]
    assert in_order == sorted(in_order), "shortest first, so that groups pad little"
