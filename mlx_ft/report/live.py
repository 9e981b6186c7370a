"""Lines of `mlx-ft watch`: curves, figures and last answers on a terminal; one line per measurement
in a log.

Does not: read files, draw on the terminal, or wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_ft.runs.document import is_report
from mlx_ft.text import quantities as q
from mlx_ft.text.safe import one_line
from mlx_ft.text.sparklines import trend


def rate_text(value: Any) -> str:
    """Format a learning rate with three digits: 4e-4, 1.23e-5."""
    return q.compact(float(f"{value:.3g}")) if q.is_number(value) else q.compact(value)


LABEL_WIDTH = 16
SHOWN_ANSWERS = 3
# Name in a line of metrics, what it is called, how it is written.
CURVES = (
    ("loss", "training loss", q.loss),
    ("learning_rate", "learning rate", rate_text),
    ("gradient_norm", "gradient norm", q.loss),
    ("tokens_per_second", "speed", q.rate),
    ("peak_memory_bytes", "peak memory", q.format_bytes),
)


def picture(
    title: str,
    words: str,
    metrics: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    width: int,
) -> list[str]:
    """Return the lines that show a run now, none wider than `width` columns.

    `metrics` are lines of metrics.jsonl, `answers` of a sample log, the newest last.
    """
    lines = [f"{title}: {words}"]
    reports = [line for line in metrics if is_report(line)]
    curves_width = max(8, min(60, width - LABEL_WIDTH - 24))
    for key, label, form in CURVES:
        values = _values(reports, key)
        if values:
            lines.append(_curve(label, values, form(values[-1]), curves_width))
        if key == "loss":
            losses = _values([m for m in metrics if m.get("kind") == "validation"], key)
            if losses:
                last = f"{q.loss(losses[-1])}, lowest {q.loss(min(losses))}"
                lines.append(_curve("validation loss", losses, last, curves_width))
    if reports:
        lines.append(_progress(reports[-1], curves_width))
    for answer in answers[-SHOWN_ANSWERS:]:
        lines += answer_lines(answer)
    return [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]


def _values(lines: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [line[key] for line in lines if q.is_number(line.get(key))]


def _curve(label: str, values: Sequence[float], last: str, width: int) -> str:
    return f"{label:<{LABEL_WIDTH}}{trend(values, width)} {last}"


def _progress(last: Mapping[str, Any], width: int) -> str:
    done, of = last.get("iteration"), last.get("iterations")
    if not (q.is_number(done) and q.is_number(of)) or of <= 0:
        return f"{'iteration':<{LABEL_WIDTH}}{q.count(done)}"
    filled = round(width * min(1.0, done / of))
    bar = "━" * filled + "╌" * (width - filled)
    return f"{'iteration':<{LABEL_WIDTH}}{bar} {q.count(done)} of {q.count(of)}"


def answer_lines(answer: Mapping[str, Any]) -> list[str]:
    """Return the last question and the model's answer, as two lines."""
    messages = answer.get("messages")
    asked = messages[-1].get("content") if isinstance(messages, list) and messages else ""
    score = f" ({q.score(answer['score'])})" if q.is_number(answer.get("score")) else ""
    if answer.get("degenerate"):
        score = f" (degenerate: {one_line(str(answer['degenerate']), 60)})"
    said = one_line(str(answer.get("text", "")), 200) or "no output"
    return [f"asked{score}: {one_line(str(asked), 160)}", f"  said: {said}"]


def metric_line(metric: Mapping[str, Any]) -> str:
    """Return a line of metrics.jsonl as a line of a log, with units."""
    place = f"iteration {q.count(metric.get('iteration'))} of {q.count(metric.get('iterations'))}"
    kind = metric.get("kind")
    if kind == "validation":
        return f"{place}: validation loss {q.loss(metric.get('loss'))}"
    if kind != "train":
        return f"{place}: {one_line(str(kind), 40)}, loss {q.loss(metric.get('loss'))}"
    parts = [
        f"loss {q.loss(metric.get('loss'))}",
        f"learning rate {rate_text(metric.get('learning_rate'))}",
        f"gradient norm {q.loss(metric.get('gradient_norm'))}",
        q.rate(metric.get("tokens_per_second")),
        f"peak memory {q.format_bytes(metric.get('peak_memory_bytes'))}",
        f"{q.format_seconds(metric.get('seconds_left'))} left",
    ]
    return f"{place}: {', '.join(parts)}"
