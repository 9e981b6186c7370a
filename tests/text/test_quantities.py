"""Every number carries its unit, and what was not recorded is never shown as a number."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.errors import RecipeError
from mlx_ft.text import quantities as q


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (q.format_bytes(0), "0 B"),
        (q.format_bytes(999), "999 B"),
        (q.format_bytes(1000), "1.00 kB"),
        (q.format_bytes(999_999), "1.00 MB"),
        (q.format_bytes(1_234_567), "1.23 MB"),
        (q.format_bytes(9_996_000), "10.0 MB"),
        (q.format_bytes(93_400_000), "93.4 MB"),
        (q.format_bytes(99_960_000), "100 MB"),
        (q.format_bytes(123_456_789), "123 MB"),
        (q.format_bytes(999_900_000), "1.00 GB"),
        (q.format_bytes(1_734_000_000), "1.73 GB"),
        (q.format_bytes(25_276_510_208), "25.3 GB"),
        (q.format_bytes(2e12), "2.00 TB"),
        (q.format_seconds(0), "0.00 s"),
        (q.format_seconds(0.421), "0.42 s"),
        (q.format_seconds(9.999), "10 s"),
        (q.format_seconds(59.6), "1 min 00 s"),
        (q.format_seconds(125), "2 min 05 s"),
        (q.format_seconds(151), "2 min 31 s"),
        (q.format_seconds(3599.9), "1 h 00 min"),
        (q.format_seconds(3840), "1 h 04 min"),
        (q.format_seconds(11_220), "3 h 07 min"),
        (q.share(0.964), "96.4 %"),
        (q.share(1), "100 %"),
        (q.compact(1e-4), "1e-4"),
        (q.compact(2.5e-5), "2.5e-5"),
        (q.compact(0.05), "0.05"),
        (q.compact(16), "16"),
        (q.plural(1, "row"), "1 row"),
        (q.plural(1200, "row"), "1,200 rows"),
        (q.moment(0), "1970-01-01 00:00 UTC"),
        (q.interval(0.8, 1), "0.80\N{EN DASH}1.00"),
        (q.interval(None, 1), ""),
    ],
)
def test_examples(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize(
    "form",
    [
        q.format_bytes,
        q.format_seconds,
        q.count,
        q.share,
        q.score,
        q.loss,
        q.rate,
        q.compact,
        q.moment,
    ],
)
@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, q.NOT_RECORDED), ("odd", "odd"), (True, "True"), (float("nan"), "nan")],
)
def test_what_is_no_number_is_shown_as_it_is(form: Any, value: Any, shown: str) -> None:
    assert form(value) == shown


@given(st.integers(1000, 10**15 - 10**12))
def test_bytes_have_three_significant_digits(count: int) -> None:
    digits, _, unit = q.format_bytes(count).partition(" ")
    assert len(digits.replace(".", "")) == 3
    size = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit]
    assert abs(float(digits) * size - count) <= 0.0051 * count


@pytest.mark.parametrize(
    ("text", "count"),
    [("16GB", 16 * 10**9), ("0.5 gb", 5 * 10**8), ("800 MB", 8 * 10**8), ("2T", 2 * 10**12)],
)
def test_sizes_are_read_in_decimal_units(text: str, count: int) -> None:
    assert q.bytes_from_text(text) == count


@pytest.mark.parametrize("text", ["", "16", "GB", "-1GB", "16 PB", "1e3GB"])
def test_what_is_not_a_size_is_a_message(text: str) -> None:
    with pytest.raises(RecipeError, match="16GB"):
        q.bytes_from_text(text)
