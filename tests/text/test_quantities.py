"""Every number carries its unit, and what was not recorded is never shown as a number."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_ft.text import quantities as q


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (q.size(0), "0 B"),
        (q.size(999_900_000), "1,000 MB"),
        (q.size(93_400_000), "93.4 MB"),
        (q.size(1_734_000_000), "1.73 GB"),
        (q.duration(0.42), "0.4 s"),
        (q.duration(59.6), "1 min 00 s"),
        (q.duration(151), "2 min 31 s"),
        (q.duration(3599.9), "1 h 00 min"),
        (q.duration(3840), "1 h 04 min"),
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
    [q.size, q.duration, q.count, q.share, q.score, q.loss, q.rate, q.compact, q.moment],
)
@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, q.NOT_RECORDED), ("odd", "odd"), (True, "True"), (float("nan"), "nan")],
)
def test_what_is_no_number_is_shown_as_it_is(form: Any, value: Any, shown: str) -> None:
    assert form(value) == shown
