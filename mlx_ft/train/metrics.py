"""Writer of metrics.jsonl, and its lines as text: every report, validation and comparison.

Does not: measure.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from mlx_ft.system.files import flush_to_disk, read_json_lines, replacing
from mlx_ft.text.quantities import format_bytes, format_seconds

METRICS_FILE = "metrics.jsonl"
# Validations in a row above the lowest one before a line says so.
RISING_VALIDATIONS = 3

Metric = dict[str, Any]


class MetricsFile:
    """Writes metrics.jsonl, each line flushed; a resumed run drops lines after its checkpoint."""

    def __init__(self, file: Path, upto_iteration: int) -> None:
        old = read_json_lines(file) if upto_iteration else []
        kept = [metric for metric in old if metric["iteration"] <= upto_iteration]
        with replacing(file) as fresh, fresh.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(metric) + "\n" for metric in kept)
        self.lines: list[Metric] = kept
        self._file = file
        self._stream: TextIO = file.open("a", encoding="utf-8")

    def add(self, metric: Metric) -> None:
        """Write one line."""
        self.lines.append(metric)
        self._stream.write(json.dumps(metric) + "\n")
        self._stream.flush()

    def flush_to_disk(self) -> None:
        """Flush the lines to disk: a checkpoint is useless without the metrics before it."""
        flush_to_disk(self._file)

    def close(self) -> None:
        """Close the file; `lines` stay."""
        self._stream.close()

    def last(self, kind: str, so: Callable[[Metric], bool] = lambda metric: True) -> Metric | None:
        """Return the last metric of a kind for which `so` holds."""
        return next((m for m in reversed(self.lines) if m["kind"] == kind and so(m)), None)

    def first(self, kind: str) -> Metric | None:
        """Return the first metric of a kind."""
        return next((m for m in self.lines if m["kind"] == kind), None)


def metric_line(metric: Metric) -> str:
    """Return a report or validation as one line with units."""
    place = f"iteration {metric['iteration']} of {metric['iterations']}"
    if metric["kind"] == "selection":
        return f"  {place}: {_comparison(metric)}"
    if metric["kind"] == "validation":
        line = (
            f"  {place}: validation loss {metric['loss']:.4f} ({metric['trained_tokens']} tokens)"
        )
        if metric["validations_since_best"] >= RISING_VALIDATIONS:
            line += (
                f"; above its lowest, at iteration {metric['best_iteration']}, "
                f"{metric['validations_since_best']} times in a row: the run overfits or diverges"
            )
        return line
    if metric["kind"] == "skipped":
        lines = ", ".join(map(str, metric["lines"]))
        return (
            f"  {place}: update {metric['update']} skipped, loss {metric['loss']}, gradient norm "
            f"{metric['gradient_norm']} (train rows of lines {lines})"
        )
    return (
        f"  {place} (update {metric['update']} of {metric['updates']}): loss {metric['loss']:.4f}, "
        f"learning rate {metric['learning_rate']:.2e}, "
        f"gradient norm {metric['gradient_norm']:.3g}, "
        f"{metric['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {format_bytes(metric['peak_memory_bytes'])}, "
        f"{format_seconds(metric['seconds_left'])} left"
    )


def _comparison(metric: Metric) -> str:
    """Return how the weights compare with the best so far."""
    if metric["selections_since_best"] == 0:
        against = "the best so far"
    else:
        against = (
            f"not better than at iteration {metric['best_iteration']}, "
            f"{metric['selections_since_best']} in a row"
        )
    if "score" not in metric:
        return f"validation loss {against}"
    interval = f"95 % {metric['low']:.2f} to {metric['high']:.2f}"
    return (
        f"{metric['suite']} {metric['score']:.3f} of {metric['n']} prompts ({interval}), {against}"
    )
