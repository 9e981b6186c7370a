"""metrics.jsonl: every report and validation of a training run, a line each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from mlx_ft.system.files import flush_to_disk, read_json_lines, replacing

METRICS_FILE = "metrics.jsonl"

Metric = dict[str, Any]


class MetricsFile:
    """metrics.jsonl, one flushed line each; a resumed run drops lines after its checkpoint."""

    def __init__(self, file: Path, upto_iteration: int) -> None:
        old = read_json_lines(file) if upto_iteration else []
        kept = [metric for metric in old if metric["iteration"] <= upto_iteration]
        with replacing(file) as fresh, fresh.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(metric) + "\n" for metric in kept)
        self.lines: list[Metric] = kept
        self._file = file
        self._stream: TextIO = file.open("a", encoding="utf-8")

    def add(self, metric: Metric) -> None:
        self.lines.append(metric)
        self._stream.write(json.dumps(metric) + "\n")
        self._stream.flush()

    def flush_to_disk(self) -> None:
        """Have the lines outlive the machine: a checkpoint is nothing without those before it."""
        flush_to_disk(self._file)

    def close(self) -> None:
        self._stream.close()

    def last(self, kind: str, so: Callable[[Metric], bool] = lambda metric: True) -> Metric | None:
        return next((m for m in reversed(self.lines) if m["kind"] == kind and so(m)), None)

    def first(self, kind: str) -> Metric | None:
        return next((m for m in self.lines if m["kind"] == kind), None)
