"""Base-model answers kept between runs, so that a base model is asked only once.

Does: keep token ids by model, prompt and limit, in one JSONL file a model, within a disk limit.
Does not: keep scores (rules change), text, or answers of models that only one run has.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_ft.system.files import hash_of

# Raised when the same model would answer the same prompt otherwise.
ANSWER_VERSION = 1
LIMIT_BYTES = 64 << 20
FINISH_REASONS = ("stop", "length", "loop")


def answer_key(prompt: Sequence[int], max_tokens: int) -> str:
    """Return the key of one greedy answer of one model."""
    return hash_of([ANSWER_VERSION, list(prompt), max_tokens])


class AnswerCache:
    """The answers of one model, read when it is made; `add` appends to its file at once.

    Several processes may use the same file: a line is written in one piece, and unreadable lines
    are ignored.
    """

    def __init__(self, folder: Path, model_sha256: str, limit_bytes: int = LIMIT_BYTES) -> None:
        self.path = folder / f"{model_sha256[:32]}.jsonl"
        self._limit_bytes = limit_bytes
        self._known: dict[str, tuple[tuple[int, ...], str]] = {}
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError:
            return
        for line in lines:
            entry = _entry(line)
            if entry is not None:
                self._known[entry[0]] = entry[1:]

    def get(self, key: str) -> tuple[tuple[int, ...], str] | None:
        """Return (ids, finish reason) of an answer, or None."""
        return self._known.get(key)

    def add(self, key: str, ids: Sequence[int], finish_reason: str) -> None:
        """Keep an answer; a disk that takes nothing more only loses it."""
        self._known[key] = tuple(ids), finish_reason
        line = json.dumps({"key": key, "ids": list(ids), "finish_reason": finish_reason})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as stream:
                # A line that a crash tore is ended first.
                stream.write(f"\n{line}\n".encode())
        except OSError:
            return

    def prune(self) -> None:
        """Delete the files of the models that were asked longest ago, until the rest is within the
        limit.
        """
        try:
            files = sorted(
                self.path.parent.glob("*.jsonl"),
                key=lambda path: path.stat().st_mtime,
                reverse=True,
            )
            used_bytes = 0
            for path in files:
                used_bytes += path.stat().st_size
                if used_bytes > self._limit_bytes:
                    path.unlink()
        except OSError:
            return


def _entry(line: bytes) -> tuple[str, tuple[int, ...], str] | None:
    try:
        value: Any = json.loads(line)
        key, ids, reason = value["key"], value["ids"], value["finish_reason"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    whole = isinstance(ids, list) and all(type(token) is int for token in ids)
    if not isinstance(key, str) or not whole or reason not in FINISH_REASONS:
        return None
    return key, tuple(ids), reason
