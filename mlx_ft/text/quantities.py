"""Format numbers and units for people: bytes, seconds, scores, intervals. The only formatter.

Every function takes any value of an artifact. None reads "not recorded"; a value of an unexpected
type is shown unchanged.
"""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime
from typing import Any, TypeGuard

from mlx_ft.errors import Fault, RecipeError

NOT_RECORDED = "not recorded"


def is_number(value: Any) -> TypeGuard[float]:
    """Tell whether `value` is a finite int or float (a bool is not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _otherwise(value: Any) -> str:
    return NOT_RECORDED if value is None else str(value)


def _three_digits(value: float) -> str:
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_bytes(value: Any) -> str:
    """Format bytes in decimal units, as disks and macOS count, with three significant digits.

    1500 -> "1.50 kB", 93400000 -> "93.4 MB", 1734000000 -> "1.73 GB".
    """
    if not is_number(value):
        return _otherwise(value)
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size * 0.9995:
            scaled = value / size
            decimals = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:,.{decimals}f} {unit}"
    return f"{value:.0f} B"


def format_seconds(value: Any) -> str:
    """Format a duration: 0.42 -> "0.42 s", 125 -> "2 min 05 s", 3840 -> "1 h 04 min"."""
    if not is_number(value):
        return _otherwise(value)
    if value < 9.995:
        return f"{value:.2f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: Any) -> str:
    """Format a whole number with thousands separators."""
    return f"{value:,.0f}" if is_number(value) else _otherwise(value)


def plural(value: Any, noun: str) -> str:
    """Format a count with its noun: "1 row", "2 rows"."""
    return f"{count(value)} {noun}" if value == 1 else f"{count(value)} {noun}s"


def share(value: Any) -> str:
    """Format a fraction as per cent: 0.4123 -> "41.2 %"."""
    return f"{_three_digits(100 * value)} %" if is_number(value) else _otherwise(value)


def score(value: Any) -> str:
    """Format a score with two decimals."""
    return f"{value:.2f}" if is_number(value) else _otherwise(value)


def interval(low: Any, high: Any) -> str:
    """Format an interval of scores: "0.81-0.99", with an en dash. Empty for None."""
    return f"{low:.2f}\N{EN DASH}{high:.2f}" if is_number(low) and is_number(high) else ""


def difference(value: Any) -> str:
    """Format a difference of scores with its sign: "+0.07"."""
    return f"{value:+.2f}" if is_number(value) else _otherwise(value)


def signed_interval(low: Any, high: Any) -> str:
    """Format an interval that may go below 0: "-0.02 to 0.16". Empty for None."""
    return f"{low:.2f} to {high:.2f}" if is_number(low) and is_number(high) else ""


def probability(value: Any) -> str:
    """Format a p value: 0.0312 -> "0.031", and "<0.001" below that."""
    if not is_number(value):
        return _otherwise(value)
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def loss(value: Any) -> str:
    """Format a loss with four significant digits."""
    return f"{value:.4g}" if is_number(value) else _otherwise(value)


def rate(value: Any) -> str:
    """Format a speed in tokens a second."""
    return f"{value:,.0f} tokens/s" if is_number(value) else _otherwise(value)


def compact(value: Any) -> str:
    """Format a setting: 0.0001 -> "1e-4", 0.05 -> "0.05", 16 -> "16"."""
    if not is_number(value) or isinstance(value, int):
        return _otherwise(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.6e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:g}"


def moment(value: Any) -> str:
    """Format seconds since 1970 as a minute in UTC."""
    if not is_number(value):
        return _otherwise(value)
    return datetime.fromtimestamp(value, tz=UTC).strftime("%Y-%m-%d %H:%M UTC")


def written(value: Any) -> str:
    """Return a text as it is, nothing for None, and any other JSON value as compact JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def bytes_from_text(text: str) -> int:
    """Return the bytes that `16GB` or `800 MB` spells, in decimal units. Raises RecipeError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(T|G|M|k)i?B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise RecipeError(Fault("memory", f"{text!r} is not a size", "write it as 16GB"))
    return round(float(match[1]) * {"t": 1e12, "g": 1e9, "m": 1e6, "k": 1e3}[match[2].lower()])
