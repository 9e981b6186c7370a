"""Ask every question, score, log, resume.

Does: render prompts (only through the renderer), and ask a model all suites together. Write each
answer down as it is scored, and go on after an interruption.
Does not: load models or generate (a column's `open` does), or compare columns.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from mlx_ft.errors import DataError, Fault
from mlx_ft.evaluate import sample_log
from mlx_ft.evaluate.answer_cache import AnswerCache, answer_key
from mlx_ft.evaluate.chat_fingerprint import compare_template, thinking_faults
from mlx_ft.evaluate.column import Answer, Column, Question
from mlx_ft.evaluate.paired_stats import compare_columns
from mlx_ft.evaluate.sample_log import Record
from mlx_ft.evaluate.scorers.protocol import Given
from mlx_ft.evaluate.scorers.score import reference_of, score
from mlx_ft.evaluate.signs import THINKING_TAGS, signs_of
from mlx_ft.evaluate.stats import summarise
from mlx_ft.evaluate.suites import Sample, Suite
from mlx_ft.model.chat import ChatRenderer, RowRefused
from mlx_ft.system.console import Progress
from mlx_ft.system.files import hash_of, write_json

SCHEMA = 1
# Raised when scorers or fields change, so that lines written before are not taken for new ones.
LINE_VERSION = 3


@dataclass(frozen=True)
class ColumnResult:
    """One suite answered by one model.

    records: as in the file at `path`.
    generated: how many answers are of this call.
    reused: how many were in the file already.
    """

    suite: str
    column: str
    path: Path
    records: tuple[Record, ...]
    summary: Mapping[str, Any]
    generated: int
    reused: int


@dataclass(frozen=True)
class _Plan:
    """The questions of a suite to a column, a key for each, and the records that are there."""

    suite: Suite
    column: str
    path: Path
    questions: tuple[Question, ...]
    keys: tuple[str, ...]
    found: Mapping[str, Record]

    @property
    def missing(self) -> list[int]:
        return [index for index, key in enumerate(self.keys) if key not in self.found]


def evaluate(
    suites: Sequence[Suite],
    columns: Sequence[Column],
    folder: Path,
    *,
    progress: Progress,
    allow_template_mismatch: bool = False,
    cache_folder: Path | None = None,
) -> dict[str, Any]:
    """Answer and score `suites` with each of `columns`; return and write `folder/results.json`.

    progress: its total is all answers of all columns.
    cache_folder: where answers of reusable columns are kept for other folders.

    A column is opened once, and not at all when all its answers are in `folder` already. `warnings`
    of the results name everything that makes columns less comparable than they look.
    Raises ModelError when a column's chat format is not the one it was trained with, unless that is
    allowed. Raises DataError when a suite cannot be asked this way.
    """
    faults = [
        fault for column in columns for fault in thinking_faults(suites, column.enable_thinking)
    ]
    if faults:
        raise DataError(faults)
    templates = {
        column.name: compare_template(column, allow_mismatch=allow_template_mismatch)
        for column in columns
    }
    results: dict[str, dict[str, Any]] = {suite.name: {} for suite in suites}
    records: dict[str, dict[str, tuple[Record, ...]]] = {suite.name: {} for suite in suites}
    count = _AnswerCount(progress)
    for column in columns:
        for result in _evaluated(suites, column, folder, count, cache_folder):
            results[result.suite][column.name] = dict(result.summary)
            records[result.suite][column.name] = result.records
    for suite_name, compared in compare_columns(records).items():
        for name, against in compared.items():
            results[suite_name][name]["against"] = against
    document = {
        "schema": SCHEMA,
        "suites": results,
        "suite_info": {suite.name: _suite_info(suite) for suite in suites},
        "columns": {
            column.name: {**(column.facts or {}), "template": templates[column.name].state}
            for column in columns
        },
        "warnings": [
            *(text for check in templates.values() for text in check.warnings),
            *(text for column in columns for text in _unseen_tools(suites, column)),
        ],
    }
    write_json(folder / "results.json", document)
    return document


def evaluate_column(
    suites: Sequence[Suite],
    column: Column,
    folder: Path,
    *,
    progress: Progress,
    cache_folder: Path | None = None,
) -> list[ColumnResult]:
    """Answer suites with one model into `folder/<suite>/<column>.jsonl`, a line a sample.

    progress: its total is the number of samples of all suites.

    Each line is written as its answer ends. A line of an earlier attempt is kept if it has the same
    key: sample, prompt ids, decoding, scorer, target and weights. At the end a file has exactly its
    suite's samples, in their order. `seconds` of a line is the time since the end of the one
    before, so that they add up to the time of the column.
    """
    return _evaluated(suites, column, folder, _AnswerCount(progress), cache_folder)


def _evaluated(
    suites: Sequence[Suite],
    column: Column,
    folder: Path,
    count: _AnswerCount,
    cache_folder: Path | None,
) -> list[ColumnResult]:
    plans = [_plan(suite, column, folder) for suite in suites]
    records = [dict(plan.found) for plan in plans]
    jobs = [(number, index) for number, plan in enumerate(plans) for index in plan.missing]
    if jobs:
        with ExitStack() as files:
            writer = _Writer(plans, records, column, files, count)
            cache = None
            if cache_folder is not None and column.reusable:
                cache = AnswerCache(cache_folder, column.sha256)
                files.callback(cache.prune)
            jobs = [job for job in jobs if not writer.written_from(cache, *job)]
            if jobs:
                _ask(column, plans, jobs, writer, cache)
    return [_finished(plan, found) for plan, found in zip(plans, records, strict=True)]


def _ask(
    column: Column,
    plans: Sequence[_Plan],
    jobs: Sequence[tuple[int, int]],
    writer: _Writer,
    cache: AnswerCache | None,
) -> None:
    """Have the questions of `jobs` (plan, sample) answered, and each answer written down."""
    questions = [plans[number].questions[index] for number, index in jobs]

    def on_done(position: int, answer: Answer) -> None:
        writer.write(*jobs[position], answer)
        question = questions[position]
        if cache is not None and question.ids is not None and answer.ids is not None:
            key = answer_key(question.ids, question.max_tokens)
            cache.add(key, answer.ids, answer.finish_reason)

    with column.open() as respondent:
        respondent.answer(questions, on_done)
        # Else this frame would keep the weights while the next column loads its own.
        del respondent


class _AnswerCount:
    """Adds up the answers of all suites and columns on one progress line."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._answered: dict[str, int] = {}

    def update(self, asked: str, done: int, of: int) -> None:
        """Show that one column has answered `done` samples `of` one suite's."""
        self._answered[asked] = done
        self._progress.update(sum(self._answered.values()), f"{asked}: {done} of {of} samples")


class _Writer:
    """Scores answers, appends them to their files, and tells how far it has come."""

    def __init__(
        self,
        plans: Sequence[_Plan],
        records: Sequence[dict[str, Record]],
        column: Column,
        files: ExitStack,
        count: _AnswerCount,
    ) -> None:
        self._plans, self._records, self._column = plans, records, column
        self._files, self._count = files, count
        self._streams: dict[int, BinaryIO] = {}
        self._ended = time.perf_counter()

    def written_from(self, cache: AnswerCache | None, number: int, index: int) -> bool:
        """Write the answer that an earlier evaluation has kept; return whether there was one."""
        question, renderer = self._plans[number].questions[index], self._column.renderer
        if cache is None or renderer is None or question.ids is None or question.reference:
            return False
        kept = cache.get(answer_key(question.ids, question.max_tokens))
        if kept is None:
            return False
        ids, reason = kept
        raw = renderer.decode_raw(ids)
        self.write(number, index, Answer(renderer.decode(ids), raw, ids, reason, len(ids)))
        return True

    def write(self, number: int, index: int, answer: Answer) -> None:
        """Score an answer and write its line."""
        plan, now = self._plans[number], time.perf_counter()
        key = plan.keys[index]
        record = _record(plan.suite, plan.suite.samples[index], answer)
        record |= {"seconds": now - self._ended, "key": key}
        self._ended = now
        if number not in self._streams:
            plan.path.parent.mkdir(parents=True, exist_ok=True)
            self._streams[number] = self._files.enter_context(plan.path.open("ab"))
        sample_log.append(self._streams[number], record)
        self._records[number][key] = record
        done, of = len(self._records[number]), len(plan.suite.samples)
        self._count.update(f"{plan.suite.name}, {plan.column}", done, of)


def questions_of(suite: Suite, renderer: ChatRenderer | None) -> tuple[Question, ...]:
    """Return the question of each sample, rendered unless `renderer` is None (a server does it).

    Raises DataError with all that cannot be rendered.
    """
    questions = []
    faults = []
    for sample in suite.samples:
        question = Question(sample.messages, sample.tools, None, suite.max_tokens, suite.stop)
        try:
            questions.append(_rendered(question, suite, sample, renderer))
        except RowRefused as error:
            where = f"suite {suite.name}, sample {sample.id}"
            faults.append(Fault(where, str(error), "change its messages, or leave it out"))
    if faults:
        raise DataError(faults)
    return tuple(questions)


def _rendered(
    question: Question, suite: Suite, sample: Sample, renderer: ChatRenderer | None
) -> Question:
    text = reference_of(suite.scorer, sample.target)
    if renderer is None:
        if text is not None:
            raise RowRefused("a server does not tell the loss of a reference")
        return question
    ids = tuple(renderer.prompt_ids(sample.messages, sample.tools))
    if text is None:
        return replace(question, ids=ids)
    reference = renderer.answer_ids(sample.messages, text, sample.tools)
    return replace(question, ids=ids, reference=reference)


def cut_at_stop(text: str, stops: Iterable[str]) -> tuple[str, str | None]:
    """Return the text before the first stop text in it, and which one that was (or None)."""
    found = [(text.find(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    position, stop = min(found)
    return text[:position], stop


def without_thinking(text: str) -> str:
    """Return the text after the last `</think>`; all of it when thinking was never closed."""
    return text.rpartition(THINKING_TAGS[1])[2]


def _plan(suite: Suite, column: Column, folder: Path) -> _Plan:
    questions = questions_of(suite, column.renderer)
    decoding = {
        "version": LINE_VERSION,
        "greedy": True,
        "max_tokens": suite.max_tokens,
        "stop": suite.stop,
        "enable_thinking": suite.enable_thinking,
        "scorer": suite.scorer_config,
        "model": column.sha256,
    }
    common = hash_of(decoding)
    asked = [
        question.ids or [[dict(each) for each in question.messages], question.tools]
        for question in questions
    ]
    keys = tuple(
        hash_of([common, sample.id, prompt, sample.target])
        for sample, prompt in zip(suite.samples, asked, strict=True)
    )
    path = folder / suite.name / f"{column.name}.jsonl"
    known = {record["key"]: record for record in sample_log.recover(path)}
    found = {key: known[key] for key in keys if key in known}
    return _Plan(suite, column.name, path, questions, keys, found)


def _record(suite: Suite, sample: Sample, answer: Answer) -> Record:
    """Return the line of one answer, but for `seconds` and `key`.

    A thinking tag may be a control token, which the text of an answer leaves out: it is looked for
    in the raw text. A stop text ends the answer before it, as a client that sets it would see.
    """
    raw, raw_stop = cut_at_stop(answer.raw, suite.stop)
    text, stop = cut_at_stop(answer.text, suite.stop)
    if stop is None and raw_stop is not None:
        text, stop = raw, raw_stop
    leak = [tag for tag in THINKING_TAGS if tag == stop or tag in raw]
    judged = without_thinking(text) if suite.enable_thinking else text + "".join(leak)
    ids = answer.ids if stop is None else None
    marked = without_thinking(raw) if suite.enable_thinking else raw
    loss = answer.reference_loss
    given = Given(marked, sample.tools or (), loss)
    result = asdict(score(suite.scorer, judged, sample.target, ids, given))
    finish_reason = answer.finish_reason if stop is None else "stop_text"
    question = str(sample.messages[-1].get("content") or "")
    flags = signs_of(text, raw, ids, finish_reason, question, suite.enable_thinking)
    measured = {} if loss is None else {"reference_loss": loss}
    return {
        "id": sample.id,
        "category": sample.category,
        "weight": sample.weight,
        "messages": [dict(message) for message in sample.messages],
        "target": dict(sample.target),
        "text": text,
        "finish_reason": finish_reason,
        "flags": flags,
        "generated_tokens": answer.generated_tokens,
        **measured,
        "score": result.pop("value"),
        **result,
    }


def _finished(plan: _Plan, records: Mapping[str, Record]) -> ColumnResult:
    """Put the records in the suite's order, in memory and on disk, and sum them up."""
    assert all(key in records for key in plan.keys), "a prompt was left unanswered"
    ordered = tuple(
        {**records[key], "category": each.category, "weight": each.weight, "source": each.source}
        for key, each in zip(plan.keys, plan.suite.samples, strict=True)
    )
    plan.path.parent.mkdir(parents=True, exist_ok=True)
    sample_log.rewrite(plan.path, ordered)
    reused = len(plan.found)
    return ColumnResult(
        plan.suite.name,
        plan.column,
        plan.path,
        ordered,
        summarise(ordered),
        generated=len(ordered) - reused,
        reused=reused,
    )


def _unseen_tools(suites: Sequence[Suite], column: Column) -> Iterator[str]:
    """Yield a warning for every suite whose tools the column's template leaves out."""
    for suite in suites:
        sample = next((sample for sample in suite.samples if sample.tools), None)
        if sample is None or column.renderer is None:
            continue
        plain = column.renderer.prompt_ids(sample.messages)
        if plain == column.renderer.prompt_ids(sample.messages, sample.tools):
            yield f"{column.name}: its chat template does not show the tools of suite {suite.name}"


def _suite_info(suite: Suite) -> dict[str, Any]:
    return {
        "description": suite.description,
        "scorer": dict(suite.scorer_config),
        "max_tokens": suite.max_tokens,
        "stop": list(suite.stop),
        "enable_thinking": suite.enable_thinking,
        "tags": list(suite.tags),
        "samples": len(suite.samples),
        "margin": suite.margin,
        "file_sha256": suite.file_sha256,
    }
