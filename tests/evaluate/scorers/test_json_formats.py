"""A format is kept in full, and never makes a text raise."""

from datetime import UTC, date, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AnyUrl, BaseModel, IPvAnyAddress

from mlx_ft.evaluate.scorers.json_formats import FORMATS, has_format
from mlx_ft.evaluate.scorers.json_schema import schema_faults, violations

EXAMPLES: dict[str, tuple[list[str], list[str]]] = {
    "date": (["2024-02-29"], ["2023-02-29", "20240229", "2024-2-29", "2024-02-29T00:00:00Z"]),
    "time": (
        ["23:59:59Z", "01:02:03.5+01:00", "23:59:60Z"],
        ["24:00:00Z", "01:02:03", "01:02Z", "01:02:03+25:00"],
    ),
    "date-time": (
        ["2024-02-29T12:00:00Z", "2024-02-29t12:00:00.123-08:00"],
        ["2024-02-29 12:00:00Z", "2024-02-30T12:00:00Z", "2024-02-29T12:00:00", "2024-02-29"],
    ),
    "uuid": (["123e4567-e89b-12d3-a456-426614174000"], ["123e4567e89b12d3a456426614174000", "x"]),
    "email": (["a@example.org"], ["a", "a@", "@b", "a b@c", "a@b@c"]),
    "uri": (["https://example.org/a?b#c", "mailto:a@b", "urn:x"], ["/a", "example.org", "a: b"]),
    "ipv4": (["127.0.0.1"], ["127.0.0", "256.0.0.1", "::1"]),
    "ipv6": (["::1", "2001:db8::8a2e"], ["127.0.0.1", ":::"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_texts_of_a_format_and_others(name: str) -> None:
    right, wrong = EXAMPLES[name]
    assert [has_format(text, name) for text in right] == [True] * len(right)
    assert [has_format(text, name) for text in wrong] == [False] * len(wrong)


@given(st.text(), st.sampled_from(sorted(FORMATS)))
def test_no_text_raises(text: str, name: str) -> None:
    assert has_format(text, name) in (True, False)


@given(st.datetimes(timezones=st.just(UTC)), st.uuids(), st.dates())
def test_what_pydantic_writes_is_what_pydantic_asks_for(at: datetime, key: UUID, day: date) -> None:
    class Event(BaseModel):
        at: datetime
        key: UUID
        day: date
        link: AnyUrl | None = None

    schema: dict[str, Any] = Event.model_json_schema()
    assert not list(schema_faults(schema))
    value = Event(at=at, key=key, day=day).model_dump(mode="json")
    assert not list(violations(value, schema))
    assert list(violations({**value, "at": "tomorrow"}, schema))


def test_a_format_is_of_texts_alone() -> None:
    assert not list(violations(7, {"format": "date"}))


def test_a_format_that_is_not_known_is_refused() -> None:
    class Host(BaseModel):
        address: IPvAnyAddress

    (fault,) = schema_faults(Host.model_json_schema())
    assert fault.startswith("schema.properties.address.format is none of date, time")
