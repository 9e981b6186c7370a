"""Regex search that gives up after a second.

Pattern and text are both untrusted. A pattern such as `(a+)+$` takes Python's `re` longer than the
age of the universe on thirty letters, and models produce such texts by accident. The `regex`
package reads the same language and has a time limit.
"""

from __future__ import annotations

from typing import Any

import regex

MAX_SECONDS = 1.0
MAX_PATTERN_CHARACTERS = 2_000


class TooSlow(Exception):
    """The search was given up after `MAX_SECONDS`."""


def pattern_fault(pattern: str) -> str | None:
    """Return why a text is no pattern that can be searched for, or None."""
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        return f"it has {len(pattern):,} characters, of at most {MAX_PATTERN_CHARACTERS:,}"
    try:
        regex.compile(pattern, regex.VERSION0)
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        return str(error)
    return None


def search(pattern: str, text: str, *, ignore_case: bool = False, dot_all: bool = True) -> Any:
    """Return the first match, or None. Raises TooSlow."""
    flags = regex.VERSION0 | (regex.IGNORECASE if ignore_case else 0)
    flags |= regex.DOTALL if dot_all else 0
    try:
        return regex.compile(pattern, flags).search(text, timeout=MAX_SECONDS)
    except TimeoutError as error:
        raise TooSlow(f"searching took over {MAX_SECONDS:g} s") from error
