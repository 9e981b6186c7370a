"""Outputs of the evaluation side by side, sample by sample.

Does: join `eval/<suite>/<column>.jsonl` by sample id, merge columns with the same output, and put
the most telling samples first.
Does not: score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_ft.runs.document import ordered_columns
from mlx_ft.runs.reader import ArtifactReader
from mlx_ft.text.quantities import is_number, written

SHOWN = 12
PASSED = 1.0


@dataclass(frozen=True)
class Answer:
    """One output of a sample.

    columns: all columns with this output and this score.
    The other fields are those of the sample log.
    """

    columns: tuple[str, ...]
    text: str
    score: Any
    failure: str | None
    reason: str
    finish_reason: str

    @property
    def passed(self) -> bool:
        """Whether the answer has the full score and no failure."""
        return self.failure is None and is_number(self.score) and self.score >= PASSED

    @property
    def remark(self) -> str:
        """Why it did not pass, and whether it was cut off."""
        parts = [] if self.passed else [self.reason]
        endings = {"length": "stopped at the length limit", "stop_text": "ended by a stop text"}
        parts.append(endings.get(self.finish_reason, ""))
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Sample:
    """One prompt with the columns' answers, in the columns' order."""

    id: str
    category: str
    messages: tuple[tuple[str, str], ...]
    target: str
    answers: tuple[Answer, ...]

    def passed(self, column: str) -> bool:
        """Whether `column` answered this sample and passed."""
        return any(column in answer.columns and answer.passed for answer in self.answers)


@dataclass(frozen=True)
class SuiteSamples:
    """All samples of a suite: the `first` ones to show, and the `rest`."""

    suite: str
    columns: tuple[str, ...]
    first: tuple[Sample, ...]
    rest: tuple[Sample, ...]


def read_suite_samples(reader: ArtifactReader) -> list[SuiteSamples]:
    """Return the samples of every suite that has any, also of an unfinished evaluation."""
    folder = reader.folder("eval")
    if folder is None:
        return []
    suites = []
    for path in sorted(p for p in (reader.run / folder).iterdir() if p.is_dir()):
        files = {file.stem: f"{folder}/{path.name}/{file.name}" for file in path.glob("*.jsonl")}
        rows = {column: reader.json_lines(files[column]) for column in ordered_columns(files)}
        if any(rows.values()):
            suites.append(_suite(path.name, rows))
    return suites


def _suite(name: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> SuiteSamples:
    by_id: dict[str, dict[str, Mapping[str, Any]]] = {}
    for column, lines in rows.items():
        for line in lines:
            by_id.setdefault(str(line.get("id")), {})[column] = line
    samples = [_sample(sample_id, lines) for sample_id, lines in by_id.items()]
    ordered = most_telling_first(samples, list(rows))
    return SuiteSamples(name, tuple(rows), tuple(ordered[:SHOWN]), tuple(ordered[SHOWN:]))


def _sample(sample_id: str, lines: Mapping[str, Mapping[str, Any]]) -> Sample:
    first = next(iter(lines.values()))
    return Sample(
        sample_id,
        str(first.get("category", "")),
        conversation(first.get("messages")),
        written(first.get("target")),
        _answers(lines),
    )


def _answers(lines: Mapping[str, Mapping[str, Any]]) -> tuple[Answer, ...]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for column, line in lines.items():
        key = (written(line.get("text")), str(line.get("score")), str(line.get("failure")))
        groups.setdefault(key, []).append(column)
    answers = []
    for (text, _, _), columns in groups.items():
        line = lines[columns[0]]
        failure = line.get("failure")
        answers.append(
            Answer(
                tuple(columns),
                text,
                line.get("score"),
                None if failure is None else str(failure),
                written(line.get("reason")),
                str(line.get("finish_reason", "")),
            )
        )
    return tuple(answers)


def most_telling_first(samples: Sequence[Sample], columns: Sequence[str]) -> list[Sample]:
    """Order samples: the last column fails, then another tuned column fails, then all the others.

    Within each of the three, categories take turns, so that the first dozen shows all of them.
    """
    tuned = [column for column in columns if column != "base"] or list(columns)

    def rank(sample: Sample) -> int:
        if not sample.passed(tuned[-1]):
            return 0
        return 2 if all(sample.passed(column) for column in tuned) else 1

    turns: dict[tuple[int, str], int] = {}
    keyed = []
    for position, sample in enumerate(samples):
        group = (rank(sample), sample.category)
        turns[group] = turns.get(group, 0) + 1
        keyed.append((group[0], turns[group], position, sample))
    return [sample for _, _, _, sample in sorted(keyed, key=lambda entry: entry[:3])]


def conversation(messages: Any) -> tuple[tuple[str, str], ...]:
    """Return (role, text) of each message. Anything unexpected is shown unchanged."""
    if not isinstance(messages, list):
        return (("", written(messages)),)
    return tuple(
        (str(message.get("role", "")), written(message.get("content")))
        if isinstance(message, dict)
        else ("", written(message))
        for message in messages
    )
