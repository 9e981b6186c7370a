"""Formats of strings in a JSON Schema (`format: date-time`), as JSON Schema 2020-12 names them.

Does not: know a format in part. A schema with another format is refused.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from datetime import date, time
from uuid import UUID

# RFC 3339, section 5.6; the date and the time are parsed besides.
_DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_TIME = re.compile(r"(\d\d:\d\d:\d\d)(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
# RFC 3986, section 3: a scheme, and no character that a URI must escape.
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s<>\"{}|\\^`]*")
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+")


def _is_date(text: str) -> bool:
    return bool(_DATE.fullmatch(text) and date.fromisoformat(text))


def _is_time(text: str) -> bool:
    parts = _TIME.fullmatch(text)
    if parts is None:
        return False
    clock, _, offset = parts.groups()
    # RFC 3339 allows a leap second, which Python's time does not hold.
    time.fromisoformat(clock.removesuffix("60") + "59" if clock.endswith(":60") else clock)
    return offset in "Zz" or bool(time.fromisoformat(offset[1:]) is not None)


def _is_date_time(text: str) -> bool:
    return text[10:11] in ("T", "t") and _is_date(text[:10]) and _is_time(text[11:])


FORMATS: Mapping[str, Callable[[str], object]] = {
    "date": _is_date,
    "time": _is_time,
    "date-time": _is_date_time,
    "uuid": lambda text: _UUID.fullmatch(text) and UUID(text),
    "email": _EMAIL.fullmatch,
    "uri": _URI.fullmatch,
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
}


def has_format(text: str, name: str) -> bool:
    """Return whether a text has a format of FORMATS."""
    try:
        return bool(FORMATS[name](text))
    except ValueError:
        return False
