"""Read a suite: a YAML file that says how to ask and score, and the JSONL file of its samples.

Does: check both strictly (`suite_keys.py` and `evaluate/scorers/registry.py` have the keys), also
that the right answer of each sample gets the full score. Every fault comes at once, with file:line.
Does not: render, generate, or import MLX.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from mlx_ft.errors import DataError, Fault
from mlx_ft.evaluate.scorers.instructions import Rules
from mlx_ft.evaluate.scorers.keys import ScorerKeys
from mlx_ft.evaluate.scorers.protocol import Given, Scorer
from mlx_ft.evaluate.scorers.registry import SCORERS
from mlx_ft.evaluate.scorers.score import ideal_answer, score
from mlx_ft.evaluate.scorers.tool_calls import WantedCall, WantedToolCall
from mlx_ft.evaluate.suite_keys import Message, SampleLine, SuiteFile
from mlx_ft.recipe.fields import Section
from mlx_ft.recipe.strict_yaml import Reading, key_path, label_of, read_mapping, read_text, shown
from mlx_ft.system.files import file_sha256, hash_of
from mlx_ft.text.suggestions import suggestion

SectionT = TypeVar("SectionT", bound=Section)
IN_BACKTICKS = "`{}`".format


@dataclass(frozen=True)
class Sample:
    """One question of a suite.

    messages: the conversation up to the answer
    tools: the tools that the prompt declares (None: there are none)
    target: the keys that the suite's scorer compares the answer with
    weight: how much it counts in the mean
    source: samples of one source count as one draw in the intervals
    example: a right answer (None: none is given)
    """

    id: str
    category: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None
    target: Mapping[str, Any]
    weight: float
    source: str | None = None
    example: str | None = None


@dataclass(frozen=True)
class Suite:
    """Samples, how they are asked and how the answers are scored. Decoding is greedy.

    scorer_config: the scorer's keys as they stand in the file
    max_tokens: longest answer (tokens)
    stop: texts that end an answer
    file_sha256: hash of both files
    margin: the loss against the base that, once it is proven, stops a run (None: no such limit)
    """

    name: str
    description: str
    samples: tuple[Sample, ...]
    scorer: Scorer
    scorer_config: Mapping[str, Any]
    max_tokens: int
    enable_thinking: bool
    stop: tuple[str, ...]
    tags: tuple[str, ...]
    file_sha256: str
    margin: float | None = None


def load_suites(paths: Sequence[Path]) -> tuple[Suite, ...]:
    """Read several suites; raises DataError with the faults of all, also when two share a name."""
    suites: list[Suite] = []
    faults: list[Fault] = []
    for path in paths:
        try:
            suite = load_suite(path)
        except DataError as error:
            faults += error.faults
            continue
        if any(suite.name == other.name for other in suites):
            found = f"a second suite called {suite.name}"
            faults.append(Fault(str(path), found, "give each suite a name of its own"))
        suites.append(suite)
    if faults:
        raise DataError(faults)
    return tuple(suites)


def load_suite(path: Path) -> Suite:
    """Read one suite; raises DataError with every fault of the YAML file, else of the samples."""
    text, text_faults = read_text(path)
    if text_faults:
        raise DataError(text_faults)
    # A model may have to stop at a line break.
    reading = read_mapping(text, label_of(path), multiline=True)
    faults = list(reading.faults)
    file, file_faults = _checked(SuiteFile, reading.value, lambda key: _where(path, reading, key))
    scorer, scorer_faults = _scorer_keys(path, reading)
    faults += file_faults + scorer_faults
    if file is None or scorer is None or faults:
        raise DataError(faults)
    samples_path = path.parent / file.samples
    samples = _read_samples(samples_path, scorer, _where(path, reading, ("samples",)))
    return Suite(
        name=file.name,
        description=file.description,
        samples=samples,
        scorer=scorer.build(),
        scorer_config=file.scorer,
        max_tokens=file.max_tokens,
        enable_thinking=file.enable_thinking,
        stop=tuple(file.stop),
        tags=tuple(file.tags),
        file_sha256=hash_of([file_sha256(path), file_sha256(samples_path)]),
        margin=file.margin,
    )


def _where(path: Path, reading: Reading, key: Sequence[str]) -> str:
    """Return file:line of a key, or of the innermost of its parents that is in the file."""
    for length in range(len(key), 0, -1):
        source = reading.sources.get(tuple(key[:length]))
        if source is not None:
            return source.where
    return label_of(path)


def _checked(
    model: type[SectionT],
    value: Any,
    where: Callable[[Sequence[str]], str],
    parents: Sequence[str] = (),
) -> tuple[SectionT | None, list[Fault]]:
    """Return the value as `model`, or None and its faults; `parents` are the keys above it."""
    try:
        return model.model_validate(value), []
    except ValidationError as error:
        details = error.errors(include_url=False)
        keys = [(*parents, *key_path(detail["loc"])) for detail in details]
        return None, [
            _fault(model, detail, where(key), key)
            for detail, key in zip(details, keys, strict=True)
        ]


def _fault(
    model: type[Section], detail: Mapping[str, Any], where: str, key: Sequence[str]
) -> Fault:
    joined = ".".join(key)
    name = joined if joined.isprintable() else repr(joined)
    if detail["type"] == "extra_forbidden":
        inner = (Message, WantedCall, WantedToolCall, Rules)
        known = [*model.model_fields, *(name for each in inner for name in each.model_fields)]
        fix = suggestion(key[-1], known, "remove it", written=IN_BACKTICKS)
        return Fault(where, f"unknown key `{name}`", fix)
    if detail["type"] == "missing":
        return Fault(where, f"`{name}` is missing", "add it")
    message = detail["msg"].removeprefix("Value error, ").replace("\n", " ")
    found = f"`{name}` is {shown(detail['input'])}" if name else "the line"
    return Fault(where, found, message[0].lower() + message[1:])


def _scorer_keys(path: Path, reading: Reading) -> tuple[ScorerKeys | None, list[Fault]]:
    config = reading.value.get("scorer")
    if not isinstance(config, dict):
        return None, []  # already a fault of the whole file
    name = config.get("name")
    if not isinstance(name, str) or name not in SCORERS:
        known = f"use one of {', '.join(SCORERS)}"
        fix = suggestion(str(name), SCORERS, known, written=IN_BACKTICKS)
        where = _where(path, reading, ("scorer", "name"))
        return None, [Fault(where, f"`scorer.name` is {shown(name)}", fix)]
    keys = SCORERS[name].keys
    return _checked(keys, config, lambda key: _where(path, reading, key), ("scorer",))


def _read_samples(path: Path, scorer: ScorerKeys, asked_at: str) -> tuple[Sample, ...]:
    try:
        # Lines end in \n only: str.splitlines would also cut at U+2028 inside a text.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        found = f"{path} cannot be read ({error.strerror})"
        raise DataError(Fault(asked_at, found, "check `samples`")) from error
    except UnicodeDecodeError as error:
        found = f"is not UTF-8 text (byte {error.start})"
        raise DataError(Fault(str(path), found, "save it as UTF-8")) from error
    samples: list[Sample] = []
    faults: list[Fault] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        sample, sample_faults = _read_sample(f"{path}:{number}", line, scorer)
        faults += sample_faults
        if sample is None:
            continue
        if sample.id in first_line:
            again = f"id {sample.id!r} is also on line {first_line[sample.id]}"
            faults.append(Fault(f"{path}:{number}", again, "give each sample an id of its own"))
        first_line.setdefault(sample.id, number)
        samples.append(sample)
    if not faults and not samples:
        faults.append(Fault(str(path), "has no samples", "write one JSON object a line"))
    if faults:
        raise DataError(faults)
    return tuple(samples)


def _read_sample(where: str, line: str, scorer: ScorerKeys) -> tuple[Sample | None, list[Fault]]:
    try:
        value = json.loads(line, object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return None, [Fault(where, f"is not JSON ({error})", "write one JSON object a line")]
    row, faults = _checked(SampleLine, value, lambda _: where)
    target = value.get("target") if isinstance(value, dict) else None
    if not isinstance(target, dict):
        return None, faults
    checked, target_faults = _checked(scorer.target, target, lambda _: where, ("target",))
    faults += target_faults
    misfit = scorer.target_fault(checked) if checked is not None else None
    if misfit is not None:
        faults.append(Fault(where, misfit, "correct the target, or the scorer's keys"))
    if row is None or faults:
        return None, faults
    messages = tuple(message.model_dump(exclude_unset=True) for message in row.messages)
    tools = None if row.tools is None else tuple(row.tools)
    kept = (row.target, row.weight, row.source, row.example)
    sample = Sample(row.id, row.category, messages, tools, *kept)
    fault = _own_answer_fault(sample, scorer.build())
    return sample, [] if fault is None else [Fault(where, *fault)]


def _own_answer_fault(sample: Sample, scorer: Scorer) -> tuple[str, str] | None:
    """Return (found, fix) when the sample's own right answer does not get the full score.

    The right answer is its `example`, or else the text that its target spells. A target that
    cannot be met, such as an accepted word that the scorer forbids, would look like a model that
    fails.
    """
    spelled = ideal_answer(scorer, sample.target)
    answer = sample.example or spelled
    if answer is None:
        return None
    judged = score(scorer, answer, sample.target, None, Given(None, sample.tools or (), 0.0))
    if judged.value == 1.0:
        return None
    what = (
        "its example" if sample.example else f"the answer that its target spells, {answer!r:.60},"
    )
    found = f"{what} scores {judged.value:.2f} ({judged.failure}: {judged.reason:.120})"
    return found, "correct the target, the example or the scorer's keys"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"key {key!r} is given twice")
        value[key] = item
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")
