"""Statistics say what a second, slower count says."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.data.render import RenderedSplit, render_split
from mlx_ft.data.rows import read_rows
from mlx_ft.data.statistics import (
    coverage,
    length_histogram,
    length_quantiles,
    overlap,
    split_statistics,
)
from mlx_ft.model.chat import ChatRenderer
from mlx_ft.recipe.schema import DataRecipe
from tests.data.conftest import WriteFile
from tests.support.chats import chat

row_lengths = st.lists(st.integers(1, 9000), min_size=1, max_size=60)


def rendered(path: Path, renderer: ChatRenderer, max_seq_length: int = 64) -> RenderedSplit:
    data = DataRecipe(path=str(path.parent), max_seq_length=max_seq_length)
    return render_split(path, read_rows(path).rows, renderer, data)


@given(lengths=row_lengths)
def test_quantiles_are_lengths_of_rows_in_order(lengths: list[int]) -> None:
    quantiles = length_quantiles(lengths)
    assert quantiles["max"] == max(lengths)
    assert list(quantiles.values()) == sorted(quantiles.values())
    assert set(quantiles.values()) <= set(lengths)
    assert sum(length <= quantiles["p95"] for length in lengths) >= 0.95 * len(lengths)


@given(lengths=row_lengths)
def test_every_row_is_in_one_bin(lengths: list[int]) -> None:
    histogram = length_histogram(lengths)
    edges, counts = histogram["edges"], histogram["counts"]
    assert len(edges) == len(counts) + 1 <= 21
    assert edges == sorted(set(edges))
    assert sum(counts) == len(lengths)
    assert counts[0] == sum(length < edges[1] or len(counts) == 1 for length in lengths)


@given(lengths=row_lengths, chosen=st.integers(8, 9000))
def test_coverage_is_the_share_of_rows_that_fit(lengths: list[int], chosen: int) -> None:
    shares = coverage(lengths, chosen)
    assert set(shares) == {str(limit) for limit in (256, 512, 1024, 2048, 4096, chosen)}
    assert [int(limit) for limit in shares] == sorted(int(limit) for limit in shares)
    for limit, share in shares.items():
        assert share == pytest.approx(sum(x <= int(limit) for x in lengths) / len(lengths))


def test_coverage_counts_the_rows_that_were_left_out(
    renderer: ChatRenderer, write_file: WriteFile
) -> None:
    long = "the quick brown fox " * 40
    split = rendered(write_file([chat(), chat(), chat(), chat(answer=long)]), renderer)
    assert len(split.kept) == 3
    assert coverage(split.all_lengths, 64)["64"] == 0.75
    stats = split_statistics(split, renderer.stop_ids)
    assert stats["dropped_overlong"] == 1
    assert stats["length_quantiles"]["max"] > 64 >= stats["longest_kept"]


def test_counts_of_a_split(renderer: ChatRenderer, write_file: WriteFile) -> None:
    two_turns = {"messages": chat("a", "b")["messages"] + chat("c", "d")["messages"]}
    rows = [
        chat(category="talk"),
        {**two_turns, "category": "talk"},
        chat(answer="<think>hm</think>yes", category="read"),
        chat("do you <think>?", "no"),
    ]
    stats = split_statistics(rendered(write_file(rows), renderer), renderer.stop_ids)
    assert stats["rows"] == 4
    assert stats["categories"] == {"(none)": 1, "read": 1, "talk": 2}
    assert stats["turns"] == 5
    assert stats["rows_by_turns"] == {"1": 3, "2": 1}
    assert stats["thinking_rows"] == 1
    assert stats["stop_trained_rows"] == 4
    assert 0 < stats["trained_tokens"] < stats["tokens"]
    assert stats["trained_share"] == stats["trained_tokens"] / stats["tokens"]


def test_no_categories_when_no_row_has_one(renderer: ChatRenderer, write_file: WriteFile) -> None:
    split = rendered(write_file([chat(), chat("what?")]), renderer)
    assert split_statistics(split, renderer.stop_ids)["categories"] == {}


def test_rows_without_a_trained_stop_token_are_not_counted(
    renderer: ChatRenderer, write_file: WriteFile
) -> None:
    split = rendered(write_file([chat(), chat("what?")]), renderer)
    opening = renderer.tokenizer.convert_tokens_to_ids("<|im_start|>")  # in every row, untrained
    assert split_statistics(split, {opening})["stop_trained_rows"] == 0


def test_overlap_is_found_by_what_is_trained_not_by_how_it_is_written(
    renderer: ChatRenderer, write_file: WriteFile
) -> None:
    train = rendered(write_file([chat("a", "b"), chat("c", "d")]), renderer)
    other = [{"prompt": "x", "completion": "y"}, {"prompt": "c", "completion": "d"}]
    valid = rendered(write_file(other, "valid.jsonl"), renderer)
    found = overlap(train.tokens, valid.tokens)
    assert found == {"overlap_rows": 1, "overlap_lines": [[2, 2]]}
    assert overlap(train.tokens, train.tokens)["overlap_rows"] == 2


def test_statistics_are_plain_json(renderer: ChatRenderer, write_file: WriteFile) -> None:
    stats = split_statistics(rendered(write_file([chat()]), renderer), renderer.stop_ids)

    def types(value: object) -> set[type]:
        if isinstance(value, dict):
            return {str} | {kind for part in value.values() for kind in types(part)}
        if isinstance(value, list):
            return {kind for part in value for kind in types(part)}
        return {type(value)}

    assert types(stats) <= {str, int, float}
    assert not any(issubclass(kind, np.generic) for kind in types(stats))
