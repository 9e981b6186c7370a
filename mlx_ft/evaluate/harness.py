"""Ask every model the questions of every suite, and keep each answer with its score.

Does: render prompts (only through the renderer), have them answered in batches, score each answer,
write it down at once, and go on where an earlier attempt was stopped. Does not: load models (that
is `open_column`), generate (that is `generate`), or compare columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlx_ft.chat import ChatRenderer, RowRefused
from mlx_ft.errors import DataError, Fault
from mlx_ft.evaluate import sample_log
from mlx_ft.evaluate.fingerprint import check_fingerprint
from mlx_ft.evaluate.sample_log import Row
from mlx_ft.evaluate.scorers import reference_of, score
from mlx_ft.evaluate.scoring import Given
from mlx_ft.evaluate.signs import THINKING_TAGS, signs_of
from mlx_ft.evaluate.stats import summarise
from mlx_ft.evaluate.stats_paired import compare_columns
from mlx_ft.evaluate.suites import Sample, Suite
from mlx_ft.runs import hash_of, write_json

if TYPE_CHECKING:  # importing it would load MLX
    from mlx_ft.inference import Generation, LoadedModel

SCHEMA = 1
# Raised when scorers or fields change, so that lines written before are not taken for new ones.
LINE_VERSION = 2

# Told after every answer: samples answered, of how many, and by which model to which suite.
Progress = Callable[[int, int, str], None]
OpenColumn = Callable[[str], AbstractContextManager["LoadedModel"]]


class Generate(Protocol):
    """Answer prompts of token ids greedily, as `mlx_ft.inference.generate` does."""

    def __call__(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        batch_size: int,
        on_done: Callable[[int, Generation], None] | None,
    ) -> Sequence[Generation]: ...


@dataclass(frozen=True)
class ColumnResult:
    """One suite answered by one model: `rows` as in the file at `path`, and their `summary`.

    `generated` answers are of this call, `reused` ones were in the file already.
    """

    suite: str
    column: str
    path: Path
    rows: tuple[Row, ...]
    summary: Mapping[str, Any]
    generated: int
    reused: int


@dataclass(frozen=True)
class _Plan:
    """What is to be asked: a prompt and a key for each sample, and the rows already there."""

    path: Path
    prompts: tuple[list[int], ...]
    keys: tuple[str, ...]
    found: Mapping[str, Row]

    @property
    def missing(self) -> list[int]:
        return [index for index, key in enumerate(self.keys) if key not in self.found]


def evaluate(
    suites: Sequence[Suite],
    columns: Sequence[str],
    open_column: OpenColumn,
    folder: Path,
    *,
    renderer: ChatRenderer,
    fingerprint: Mapping[str, Any],
    model_sha256: Mapping[str, str],
    generate: Generate,
    batch_size: int,
    progress: Progress,
) -> dict[str, Any]:
    """Answer and score `suites` with each of `columns`; return and write `folder/results.json`.

    `open_column(column)` is entered once a column, and not at all when all its answers are in
    `folder` already; `model_sha256` names the weights of each column, for that decision. `renderer`
    and the renderer of every model must have the `fingerprint` of the training.
    Raises ModelError when they do not, DataError when a suite cannot be asked this way.
    """
    check_fingerprint(fingerprint, renderer.fingerprint())
    check_thinking(suites, renderer.enable_thinking)
    results: dict[str, dict[str, Any]] = {suite.name: {} for suite in suites}
    rows: dict[str, dict[str, tuple[Row, ...]]] = {suite.name: {} for suite in suites}
    for column in columns:
        sha256 = model_sha256[column]
        plans = [_plan(suite, column, renderer, sha256, folder) for suite in suites]
        if any(plan.missing for plan in plans):
            with open_column(column) as loaded:
                check_fingerprint(fingerprint, loaded.renderer.fingerprint())
                done = [
                    evaluate_column(
                        suite,
                        column,
                        loaded,
                        folder,
                        model_sha256=sha256,
                        generate=generate,
                        batch_size=batch_size,
                        progress=progress,
                    )
                    for suite in suites
                ]
                # Else this frame would keep the weights while the next column loads its own.
                del loaded
        else:
            done = [_finished(s, column, p) for s, p in zip(suites, plans, strict=True)]
        for result in done:
            results[result.suite][column] = dict(result.summary)
            rows[result.suite][column] = result.rows
    for suite_name, compared in compare_columns(rows).items():
        for column, against in compared.items():
            results[suite_name][column]["against"] = against
    document = {
        "schema": SCHEMA,
        "suites": results,
        "suite_info": {suite.name: _suite_info(suite) for suite in suites},
    }
    write_json(folder / "results.json", document)
    return document


def evaluate_column(
    suite: Suite,
    column: str,
    loaded: LoadedModel,
    folder: Path,
    *,
    model_sha256: str,
    generate: Generate,
    batch_size: int,
    progress: Progress,
) -> ColumnResult:
    """Answer one suite with one model into `folder/<suite>/<column>.jsonl`, a line a sample.

    Each line is written as its answer ends. A line is kept from an earlier attempt if it has the
    same key: sample, prompt ids, decoding, scorer, target and `model_sha256`. At the end the file
    has exactly the suite's samples, in its order. `seconds` of a line is the time since the one
    before it ended, so that they add up to the time of the column.
    """
    plan = _plan(suite, column, loaded.renderer, model_sha256, folder)
    missing = plan.missing
    rows = dict(plan.found)
    plan.path.parent.mkdir(parents=True, exist_ok=True)
    total = len(suite.samples)
    if missing:
        with plan.path.open("ab") as stream:
            ended = time.perf_counter()

            def keep(position: int, generation: Generation) -> None:
                nonlocal ended
                index, now = missing[position], time.perf_counter()
                sample = suite.samples[index]
                loss = _reference_loss(suite, sample, loaded)
                row = _row(suite, sample, generation, loaded.renderer, loss)
                row |= {"seconds": now - ended, "key": plan.keys[index]}
                ended = now
                sample_log.append(stream, row)
                rows[plan.keys[index]] = row
                progress(len(rows), total, f"{suite.name}, {column}")

            generate(
                loaded,
                [plan.prompts[index] for index in missing],
                max_tokens=suite.max_tokens,
                batch_size=batch_size,
                on_done=keep,
            )
    return _finished(suite, column, plan, rows)


def prompts_of(suite: Suite, renderer: ChatRenderer) -> tuple[list[int], ...]:
    """Return the prompt ids of each sample; raises DataError with all that cannot be rendered."""
    prompts = []
    faults = []
    for sample in suite.samples:
        try:
            prompts.append(renderer.prompt_ids(sample.messages, sample.tools))
        except RowRefused as error:
            where = f"suite {suite.name}, sample {sample.id}"
            faults.append(Fault(where, str(error), "change its messages, or leave it out"))
    if faults:
        raise DataError(faults)
    return tuple(prompts)


def cut_at_stop(text: str, stops: Iterable[str]) -> tuple[str, str | None]:
    """Return the text before the first stop text in it, and which one that was (or None)."""
    found = [(text.find(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    position, stop = min(found)
    return text[:position], stop


def without_thinking(text: str) -> str:
    """Return what follows the last `</think>`; all of it when thinking was never closed."""
    return text.rpartition(THINKING_TAGS[1])[2]


def check_thinking(suites: Sequence[Suite], enable_thinking: bool) -> None:
    """Raise DataError unless every suite asks in the thinking mode of the recipe's chat section."""

    def word(mode: bool) -> str:
        return str(mode).lower()

    faults = [
        Fault(
            f"suite {suite.name}",
            f"its enable_thinking is {word(suite.enable_thinking)}, but the model was trained and "
            f"is asked with {word(enable_thinking)}",
            "make it equal to the recipe's `chat.enable_thinking`",
        )
        for suite in suites
        if suite.enable_thinking != enable_thinking
    ]
    if faults:
        raise DataError(faults)


def _plan(
    suite: Suite, column: str, renderer: ChatRenderer, model_sha256: str, folder: Path
) -> _Plan:
    prompts = prompts_of(suite, renderer)
    decoding = {
        "version": LINE_VERSION,
        "greedy": True,
        "max_tokens": suite.max_tokens,
        "stop": suite.stop,
        "enable_thinking": suite.enable_thinking,
        "scorer": suite.scorer_config,
        "model": model_sha256,
    }
    common = hash_of(decoding)
    keys = tuple(
        hash_of([common, sample.id, prompt, sample.target])
        for sample, prompt in zip(suite.samples, prompts, strict=True)
    )
    path = folder / suite.name / f"{column}.jsonl"
    known = {row["key"]: row for row in sample_log.recover(path)}
    return _Plan(path, prompts, keys, {key: known[key] for key in keys if key in known})


def _reference_loss(suite: Suite, sample: Sample, loaded: LoadedModel) -> float | None:
    """Return what a scorer of the model's own probabilities has to be given, else None."""
    reference = reference_of(suite.scorer, sample.target)
    if reference is None:
        return None
    from mlx_ft.likelihood import answer_loss

    return answer_loss(loaded, sample.messages, sample.tools, reference)


def _row(
    suite: Suite,
    sample: Sample,
    generation: Generation,
    renderer: ChatRenderer,
    reference_loss: float | None = None,
) -> Row:
    """Return the line of one answer, but for `seconds` and `key`.

    A thinking tag may be a control token, which the text of a generation leaves out: it is looked
    for in the raw text. A stop text ends the answer before it, as a client that sets it would see.
    """
    raw, raw_stop = cut_at_stop(renderer.decode_raw(generation.ids), suite.stop)
    text, stop = cut_at_stop(generation.text, suite.stop)
    if stop is None and raw_stop is not None:
        text, stop = raw, raw_stop
    leak = [tag for tag in THINKING_TAGS if tag == stop or tag in raw]
    judged = without_thinking(text) if suite.enable_thinking else text + "".join(leak)
    ids = generation.ids if stop is None else None
    marked = without_thinking(raw) if suite.enable_thinking else raw
    given = Given(marked, sample.tools or (), reference_loss)
    result = asdict(score(suite.scorer, judged, sample.target, ids, given))
    finish_reason = generation.finish_reason if stop is None else "stop_text"
    question = str(sample.messages[-1].get("content") or "")
    thinks = suite.enable_thinking
    return {
        "id": sample.id,
        "category": sample.category,
        "weight": sample.weight,
        "messages": [dict(message) for message in sample.messages],
        "target": dict(sample.target),
        "text": text,
        "finish_reason": finish_reason,
        "flags": signs_of(text, raw, ids, finish_reason, question, thinks),
        "generated_tokens": len(generation.ids),
        "score": result.pop("value"),
        **result,
    }


def _finished(
    suite: Suite, column: str, plan: _Plan, rows: Mapping[str, Row] | None = None
) -> ColumnResult:
    """Put the rows in the suite's order, in memory and on disk, and sum them up."""
    rows = plan.found if rows is None else rows
    assert all(key in rows for key in plan.keys), "a prompt was left unanswered"
    ordered = tuple(
        {
            **rows[key],
            "category": sample.category,
            "weight": sample.weight,
            "source": sample.source,
        }
        for key, sample in zip(plan.keys, suite.samples, strict=True)
    )
    sample_log.rewrite(plan.path, ordered)
    reused = len(plan.found)
    return ColumnResult(
        suite.name,
        column,
        plan.path,
        ordered,
        summarise(ordered),
        generated=len(ordered) - reused,
        reused=reused,
    )


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
