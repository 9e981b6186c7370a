"""Strip control characters and credentials from untrusted text. The only sanitizer.

Untrusted is the text of a model, a data file, an environment or an old run folder.

Three uses, each of which strips what `harm_of` names and differs only in how:
- `printable`, for a terminal line: every harmful character becomes U+FFFD, so a reader sees it.
- `clean`, for reports and tables: terminal sequences go as a whole, invisible characters that
  scripts and emoji need (joiners) stay, credentials are redacted.
- `has_control`, for YAML: refuse the text instead of changing it.

Does not: escape HTML (the template engine does) or JSON.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any, Literal

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
Harm = Literal["control", "surrogate", "direction", "format"]
HARM_OF_CATEGORY: Mapping[str, Harm] = {"Cc": "control", "Cs": "surrogate", "Cf": "format"}
# Marks and overrides of the writing direction (Unicode UAX 9), and the byte order mark.
DIRECTION = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
)


def harm_of(character: str) -> Harm | None:
    """Return why a character is stripped from untrusted text, or None for one that is kept.

    control: steers a terminal (C0 and C1; tab and newline too, which callers may keep).
    surrogate: half a character; cannot be written as UTF-8.
    direction: reorders the text around it.
    format: other invisible characters, such as joiners and soft hyphens.
    """
    if character in DIRECTION:
        return "direction"
    return HARM_OF_CATEGORY.get(unicodedata.category(character))


class _Replacements(dict[int, str | None]):
    """A table for str.translate: code point -> replacement, None to remove it. Fills on demand."""

    def __init__(self, by_harm: Mapping[Harm, str | None], kept: str = "\n\t") -> None:
        self._by_harm, self._kept = by_harm, kept

    def __missing__(self, point: int) -> str | None:
        character = chr(point)
        harm = None if character in self._kept else harm_of(character)
        self[point] = self._by_harm.get(harm, character) if harm else character
        return self[point]


FOR_TERMINAL = _Replacements(
    dict.fromkeys(("control", "surrogate", "direction", "format"), REPLACEMENT)
)
FOR_REPORTS = _Replacements({"control": None, "direction": None, "surrogate": REPLACEMENT})


def printable(text: str, limit: int | None = None) -> str:
    """Return text that cannot steer a terminal; what could is replaced by U+FFFD."""
    kept = text.translate(FOR_TERMINAL)
    return kept if limit is None or len(kept) <= limit else kept[: limit - 1] + "…"


def has_control(text: str, kept: Collection[str] = "") -> bool:
    """Return whether text has a control character or a surrogate, other than those `kept`."""
    return any(
        harm_of(character) in ("control", "surrogate")
        for character in text
        if character not in kept
    )


def as_label(text: str) -> str:
    """Return a name for a message on one line: unchanged if printable, else quoted and escaped."""
    return text if text.isprintable() else repr(text)


def quoted(value: Any, limit: int) -> str:
    """Return a value for a message: quoted, escaped and cut to about `limit` characters."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python prints
        return "a very long number"
    return text if len(text) <= limit else f"{text[:limit]}..."


# ECMA-48 (ISO/IEC 6429): CSI sequences, then strings (OSC, DCS, SOS, PM, APC) with their
# terminator, then the two-character escapes; 7-bit and 8-bit forms.
TERMINAL_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
LINE_BREAK = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
SURROGATE = re.compile(r"[\ud800-\udfff]")
CREDENTIAL = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_[A-Za-z0-9_]{20,}|AKIA[A-Z0-9]{16})"
)
CREDENTIAL_NAME = re.compile(
    r"(?:^|_)(?:api_?key|secret|password|passwd|credentials?|(?:hf|auth|access|api|hub)_token)$"
    r"|^token$",
    re.IGNORECASE,
)
REDACTED = "[redacted]"
SHORTEST_SECRET = 8  # shorter values of such variables are words such as "true"


def clean(text: str) -> str:
    """Return `text` as plain characters, tabs and newlines; lone surrogates become U+FFFD."""
    text = TERMINAL_SEQUENCE.sub("", text)
    text = LINE_BREAK.sub("\n", text).translate(FOR_REPORTS)
    return CREDENTIAL.sub(REDACTED, text)


def one_line(text: str, limit: int = 200) -> str:
    """Return cleaned `text` on one line of at most `limit` characters."""
    flat = " ".join(clean(text).split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def excerpt(text: str, limit: int) -> tuple[str, int]:
    """Return the first `limit` cleaned characters and the number of characters left out."""
    cleaned = clean(text)
    return cleaned[:limit], max(0, len(cleaned) - limit)


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """Return cleaned `text` without credentials and without the values of variables of the
    `environment` that are named like one.
    """
    secrets = [
        value
        for name, value in environment.items()
        if CREDENTIAL_NAME.search(name) and len(value) >= SHORTEST_SECRET
    ]
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    return clean(text)


def without_credentials(value: Any) -> Any:
    """Return a JSON value in which credentials, by form or by key name, are replaced.

    Other characters are kept as they are: JSON escapes them, and an exact text is evidence.
    """
    if isinstance(value, dict):
        return {
            key: REDACTED
            if isinstance(entry, str) and CREDENTIAL_NAME.search(str(key))
            else without_credentials(entry)
            for key, entry in value.items()
        }
    if isinstance(value, list):
        return [without_credentials(entry) for entry in value]
    if isinstance(value, str):
        return CREDENTIAL.sub(REDACTED, SURROGATE.sub(REPLACEMENT, value))
    return value
