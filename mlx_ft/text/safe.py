"""Make text that somebody else wrote safe to show: a model, a data file, an old run folder.

Does: remove terminal sequences, control characters, direction overrides and what looks like a
credential. Does not: escape HTML (the template engine does) or JSON.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

STEERING = ("Cc", "Cf", "Cs")  # Unicode categories: control, format, surrogate
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def printable(text: str, limit: int | None = None) -> str:
    """Return text that cannot steer a terminal: no control or direction-override characters."""
    kept = "".join(
        c if c in "\n\t" or unicodedata.category(c) not in STEERING else REPLACEMENT for c in text
    )
    return kept if limit is None or len(kept) <= limit else kept[: limit - 1] + "…"


# ECMA-48 (ISO/IEC 6429): CSI sequences, then strings (OSC, DCS, SOS, PM, APC) with their
# terminator, then the two-character escapes; 7-bit and 8-bit forms.
TERMINAL_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
LINE_BREAK = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# C0 and C1 controls except tab and newline, direction marks and overrides (Unicode UAX 9), and BOM.
CONTROL = re.compile(
    r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"
)
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
    text = LINE_BREAK.sub("\n", text)
    text = CONTROL.sub("", text)
    return CREDENTIAL.sub(REDACTED, SURROGATE.sub("\ufffd", text))


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
        return CREDENTIAL.sub(REDACTED, SURROGATE.sub("\ufffd", value))
    return value
