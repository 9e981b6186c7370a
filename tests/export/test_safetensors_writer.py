"""What is written some rows at a time is what was meant: every tensor whole, in files that hold
what they say, and that have no name before that.
"""

from pathlib import Path
from random import Random

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ft.export import safetensors_writer
from mlx_ft.export.safetensors_writer import Layout, WeightsWriter, flat_rows, row_ranges, shards

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)
DTYPES = st.sampled_from([mx.float16, mx.bfloat16, mx.float32, mx.uint32, mx.uint8])


@given(st.dictionaries(st.text(min_size=1), st.integers(1, 100), min_size=1), st.integers(1, 300))
def test_shards_hold_every_tensor_once_in_order(sizes: dict[str, int], limit: int) -> None:
    layouts = {name: Layout((size,), mx.uint8) for name, size in sizes.items()}
    found = shards(layouts, limit)
    assert [name for shard in found for name in shard] == list(sizes)
    for shard in found:
        assert len(shard) == 1 or sum(sizes[name] for name in shard) <= limit


@given(SHAPES, st.integers(1, 64))
def test_ranges_are_all_rows_in_order_and_never_of_two_matrices(
    shape: tuple[int, ...], part_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_writer, "PART_BYTES", part_bytes)
        ranges = list(row_ranges(shape, 4 * shape[-1]))
    rows = [row for first, end in ranges for row in range(first, end)]
    assert rows == list(range(flat_rows(shape)))
    if len(shape) > 2:
        matrix = shape[-2]
        assert all(first // matrix == (end - 1) // matrix for first, end in ranges)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=6), st.randoms(), st.integers(1, 200)
)
def test_rows_in_any_order_are_the_tensors(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[tuple[tuple[int, ...], mx.Dtype]],
    random: Random,
    limit: int,
) -> None:
    """As MLX reads them, whatever the shards."""
    folder = tmp_path_factory.mktemp("weights")
    arrays = {
        f"t{number}": (mx.random.normal(shape) * 9).astype(mx.int32).astype(dtype)
        for number, (shape, dtype) in enumerate(tensors)
    }
    layouts = {name: Layout(tuple(a.shape), a.dtype) for name, a in arrays.items()}
    pieces = [(name, row) for name, a in arrays.items() for row in range(flat_rows(a.shape))]
    random.shuffle(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_writer, "MAX_SHARD_BYTES", limit)
        with WeightsWriter(folder, layouts) as writer:
            for name, row in pieces:
                flat = arrays[name].reshape(flat_rows(arrays[name].shape), -1)[row : row + 1]
                mx.eval(flat)
                writer.write(name, row, flat)
            total = writer.finish()
    read: dict[str, mx.array] = {}
    for file in folder.glob("model*.safetensors"):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        read |= loaded
    assert total == sum(array.nbytes for array in arrays.values())
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype and read[name].shape == array.shape
        assert mx.array_equal(read[name], array).item()


def test_a_file_that_lacks_rows_never_gets_its_name(tmp_path: Path) -> None:
    layouts = {"a": Layout((4, 2), mx.float32)}
    with WeightsWriter(tmp_path, layouts) as writer, pytest.raises(AssertionError, match="whole"):
        writer.write("a", 0, mx.ones((3, 2)))
        writer.finish()
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
