"""Stage entry: collect facts, run the checks, write preflight.json.

Does not: know a rule (`checks.py`), train, or change anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlx_ft.data.contamination import contaminated_prompts, last_question
from mlx_ft.data.rows import FileRows
from mlx_ft.data.tokens import read_split
from mlx_ft.errors import ModelError
from mlx_ft.evaluate.chat_fingerprint import check_fingerprint
from mlx_ft.evaluate.probe import probe_file
from mlx_ft.evaluate.suites import Suite
from mlx_ft.job import Job, renderer, renderer_of
from mlx_ft.model.adapter_file import start_shapes
from mlx_ft.model.resolve import ResolvedModel
from mlx_ft.model.safetensors_headers import dequantized_shapes
from mlx_ft.preflight.checks import run_checks
from mlx_ft.preflight.findings import (
    Finding,
    OriginalFacts,
    PreflightInput,
    findings_json,
    raise_on_fail,
)
from mlx_ft.preflight.rows import trained_context
from mlx_ft.system.console import Console
from mlx_ft.system.files import read_json, write_json
from mlx_ft.system.hardware import free_disk_bytes, machine

# With fewer, the 95 % interval of a score of 0.8 is wider than 0.55 to 0.93.
FEWEST_LEFT = 15


def preflight_facts(job: Job) -> PreflightInput:
    """Return the facts that forecasts need; the data stage must be complete."""
    return PreflightInput(
        recipe=job.recipe,
        data_stats=read_json(job.folder / "data" / "stats.json"),
        model_config=job.model.config,
        model_bytes=job.model.size_bytes,
        machine=machine(),
        free_disk_bytes=free_disk_bytes(job.folder),
    )


def _original_facts(job: Job, original: ResolvedModel | None) -> OriginalFacts | None:
    if original is None:
        return None
    chat: list[str] = []
    try:
        trained, other = (renderer_of(job.recipe, each) for each in (job.model, original))
        check_fingerprint(trained.fingerprint(), other.fingerprint())
    except ModelError as error:
        chat = [f"{fault.where}: {fault.found}" for fault in error.faults]
    return OriginalFacts(
        config=original.config,
        trained_shapes=dequantized_shapes(job.model.path, job.model.config),
        shapes=dequantized_shapes(original.path, original.config),
        chat_differences=tuple(chat),
    )


def _contaminated(rows: FileRows, suites: Sequence[Suite]) -> tuple[tuple[str, int, bool], ...]:
    """Return the suites' prompts that training rows hold; see PreflightInput."""
    asked = {
        f"{suite.name}/{sample.id}": last_question(sample.messages)
        for suite in suites
        for sample in suite.samples
    }
    if not asked:
        return ()
    found = contaminated_prompts(rows.rows, asked)
    return tuple((each.prompt, each.line, each.whole) for each in found)


def _token_counts(job: Job) -> tuple[tuple[str, int], ...]:
    """Return the texts that must be one token each with the tokens that they are."""
    texts = job.recipe.preflight.single_tokens
    if not texts:
        return ()
    chat = renderer(job)
    return tuple((text, chat.token_count(text)) for text in texts)


def _rows_beyond_context(job: Job) -> int:
    """Return how many training rows have positions that the model was not made for."""
    there = trained_context(job.model.config)
    stats = read_json(job.folder / "data" / "stats.json")["splits"]["train"]
    if there is None or stats["longest_kept"] <= there:
        return 0
    return int((read_split(job.folder / "data" / "train.safetensors").lengths > there).sum())


def check(
    job: Job,
    rows: FileRows,
    suites: Sequence[Suite],
    choosing: Suite | None,
    original: ResolvedModel | None,
) -> None:
    """Run the preflight checks on the training rows into `preflight.json`.

    Raises InputError when one of them fails.
    """
    start = job.recipe.train.resume_adapter_file
    facts = replace(
        preflight_facts(job),
        contaminated=_contaminated(rows, [*suites, *([choosing] if choosing else [])]),
        token_counts=_token_counts(job),
        probed=probe_file(job.model).exists(),
        original=_original_facts(job, original),
        start_shapes=None if start is None else start_shapes(start),
        rows_beyond_context=_rows_beyond_context(job),
    )
    findings = run_checks(facts)
    if choosing is not None:
        findings = (*findings, selection_finding(choosing, suites))
    write_json(job.folder / "preflight.json", findings_json(findings))
    for finding in findings:
        say_finding(job.console, finding)
    raise_on_fail(findings)


def say_finding(console: Console, finding: Finding) -> None:
    """Print one finding of the checks as a line."""
    style = {"ok": None, "warn": "yellow", "fail": "red"}[finding.level]
    advice = f" - {finding.fix}" if finding.fix else ""
    console.say(f"  {finding.level:4} {finding.check}: {finding.measured}{advice}", style)


def selection_finding(choosing: Suite, suites: Sequence[Suite]) -> Finding:
    """Return whether the selecting prompts leave enough of their own suite to measure with."""
    measured = f"{len(choosing.samples)} prompts of {choosing.name} choose the weights"
    same = [suite for suite in suites if suite.file_sha256 == choosing.file_sha256]
    left = sum(len(suite.samples) for suite in same)
    limit = f"at least {FEWEST_LEFT} of a suite are left to measure with"
    if same:
        measured += f", {left} are left for the evaluation"
    if not same or left >= FEWEST_LEFT:
        return Finding("selection", "ok", measured, limit, "")
    fix = "choose with a suite of its own, or lower train.select.limit"
    return Finding("selection", "warn", measured, limit, fix)
