"""A file of prefix states is whole or not there, holds the same bits, and is found again only for
what it was made of.
"""

import os
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_ft.train.numerics import prefix_cache, prefix_store
from mlx_ft.train.numerics.batch import make_batch
from mlx_ft.train.numerics.prefix_cache import PrefixCache, content_key
from mlx_ft.train.numerics.prefix_store import (
    STATES_FILE,
    DiskWriter,
    Layout,
    Place,
    find_on_disk,
    make_room,
)
from tests.support.models import write_tiny_model
from tests.support.trainings import Steps, random_rows
from tests.train.conftest import MakeInputs

ROWS = random_rows(13, seed=1)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One architecture is enough here: nothing of it matters."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", layers=3)


def cache_of(make_inputs: MakeInputs, folder: Path, key: str = "key") -> PrefixCache:
    return PrefixCache(make_inputs(ROWS).forward, ROWS, 1 << 20, None, Place(folder, key))


def bits(cache: PrefixCache) -> bytes:
    return np.array(cache.batch(make_batch(ROWS, (3, 0, 7, 12)))).tobytes()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rows_come_back_as_they_were(tmp_path: Path, dtype: mx.Dtype) -> None:
    tokens = np.array([3, 1, 5])
    states = {row: mx.random.normal((int(n), 8)).astype(dtype) for row, n in enumerate(tokens)}
    writer = DiskWriter(Place(tmp_path, "key"), Layout.of(tokens, 8, dtype))
    writer.put({2: states[2]})
    writer.put({0: states[0], 1: states[1]})
    assert find_on_disk(Place(tmp_path, "key"), tokens) is None, "not before it is whole"
    writer.finish()
    store = find_on_disk(Place(tmp_path, "key"), tokens)
    assert store is not None and store.held_bytes == 9 * 8 * dtype.size
    for row, state in states.items():
        assert row in store and store.get(row).dtype == dtype
        assert mx.array_equal(store.get(row), state).item()
    assert 3 not in store and -1 not in store


def test_a_second_run_finds_the_file_and_computes_nothing(
    make_inputs: MakeInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cache_of(make_inputs, tmp_path)
    first.fill(Steps())
    in_memory = PrefixCache(make_inputs(ROWS).forward, ROWS, 1 << 20)
    in_memory.fill(Steps())
    assert first.is_complete and bits(first) == bits(in_memory)

    def never(*_: object) -> None:
        raise AssertionError("computed again")

    again = cache_of(make_inputs, tmp_path)
    monkeypatch.setattr(PrefixCache, "_compute", never)
    again.fill(Steps())
    assert again.is_complete and bits(again) == bits(first)
    with pytest.raises(AssertionError, match="computed again"):
        cache_of(make_inputs, tmp_path, "another key").fill(Steps())


def test_a_torn_file_is_written_again(make_inputs: MakeInputs, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    first = cache_of(make_inputs, folder)
    first.fill(Steps())
    kept = bits(first)
    file = folder / "key" / "states.bin"
    file.write_bytes(file.read_bytes()[:-1])
    assert find_on_disk(Place(folder, "key"), ROWS.lengths - 1) is None
    again = cache_of(make_inputs, folder)
    again.fill(Steps())
    assert again.is_complete and bits(again) == kept
    assert find_on_disk(Place(folder, "key"), ROWS.lengths - 1) is not None
    assert sorted(path.name for path in folder.iterdir()) == ["key"]


def test_a_damaged_file_of_the_right_size_is_written_again(
    make_inputs: MakeInputs, tmp_path: Path
) -> None:
    first = cache_of(make_inputs, tmp_path)
    first.fill(Steps())
    expected = bits(first)
    file = tmp_path / "key" / STATES_FILE
    file.write_bytes(bytes(file.stat().st_size))
    again = cache_of(make_inputs, tmp_path)
    again.fill(Steps())
    assert bits(again) == expected
    assert find_on_disk(Place(tmp_path, "key"), ROWS.lengths - 1) is not None


def test_a_full_disk_costs_the_file_and_not_the_run(
    make_inputs: MakeInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"

    def full(self: DiskWriter, states: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiskWriter, "put", full)
    cache = cache_of(make_inputs, folder)
    cache.fill(Steps())
    assert cache.is_complete and not list(folder.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(prefix_cache, "fits_on_disk", lambda folder, needed: False)
    cache = cache_of(make_inputs, folder)
    cache.fill(Steps())
    assert cache.is_complete and not list(folder.iterdir())


def test_the_key_names_rows_and_what_computes_them() -> None:
    key = content_key(ROWS, "model a")
    assert key == content_key(random_rows(13, seed=1), "model a")
    others = {
        content_key(ROWS, "model b"),
        content_key(random_rows(12, seed=1), "model a"),
        content_key(random_rows(13, seed=2), "model a"),
    }
    assert len(others | {key}) == 4


def test_room_is_made_from_what_was_used_longest_ago(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "middle", "old", "kept")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "states.bin").write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    make_room(tmp_path, 250, "kept")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "new"]


def test_what_a_dead_process_left_half_written_goes(tmp_path: Path) -> None:
    for name, age in (("left.1.tmp", 2 * prefix_store.ABANDONED_SECONDS), ("busy.2.tmp", 0.0)):
        file = tmp_path / name / prefix_store.STATES_FILE
        file.parent.mkdir()
        file.write_bytes(b"x")
        then = time.time() - age
        for path in (file, file.parent):
            os.utime(path, (then, then))
    make_room(tmp_path, 1 << 30, "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["busy.2.tmp"]


def test_a_disk_that_is_nearly_full_is_left_alone(tmp_path: Path) -> None:
    assert prefix_store.fits_on_disk(tmp_path / "new", 1000)
    assert not prefix_store.fits_on_disk(tmp_path, 1 << 60)
    (tmp_path / "file").touch()
    assert not prefix_store.fits_on_disk(tmp_path / "file" / "folder", 1000)
