"""Each stage joined to its room: what goes in, what is sealed, what is said.

Does: the glue between a job and one room at a time. Rooms are imported when their stage runs, so
that a finished run is shown without loading MLX. Does not: decide the order (`pipeline.py`), or ask
models questions (`measuring.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_ft.errors import Fault, InputError, MlxFtError, ModelError, RunError
from mlx_ft.model.adapter_file import start_sha256, start_shapes
from mlx_ft.model.resolve import ResolvedModel, resolve_model
from mlx_ft.model.safetensors_headers import dequantized_shapes
from mlx_ft.recipe.export import fused_copy_needed_by
from mlx_ft.recipe.load import LoadedRecipe
from mlx_ft.recipe.schema import Recipe
from mlx_ft.runs.folder import read_manifest, seal, writing_stage
from mlx_ft.system.cache import cache_home
from mlx_ft.system.console import Console
from mlx_ft.system.files import hash_of, read_json, write_json
from mlx_ft.system.hardware import free_disk_bytes, machine
from mlx_ft.text.quantities import format_bytes
from mlx_ft.trackers import missing_packages

if TYPE_CHECKING:
    from mlx_ft.data.formats import FileRows
    from mlx_ft.data.show import ShownRow
    from mlx_ft.evaluate.suites import Suite
    from mlx_ft.model.chat import ChatRenderer
    from mlx_ft.preflight import Finding, OriginalFacts, PreflightInput

# Raised when a stage would make something else of the same inputs; older folders are then redone.
STAGE_VERSIONS = {"data": 2, "train": 11, "export": 6, "eval": 3}
# Hopes for a run, who is told of it, and how often it could be continued change no bit of it. What
# bounds memory does: sums of other parts differ in their last digits.
BESIDE_THE_RUN: Mapping[str, bool | dict[str, bool]] = {
    "hypothesis": True,
    "expected": True,
    "train": {
        "report_to": True,
        "project_name": True,
        "save_every": True,
        "keep_checkpoints": True,
        "segment_steps": True,
    },
}

T = TypeVar("T")


@dataclass(frozen=True)
class Resolved:
    """What a recipe's names stand for: the model, the suites, the prompts that choose a checkpoint,
    and the hash of each stage's inputs; `original` is what export.base names.
    """

    model: ResolvedModel
    original: ResolvedModel | None
    suites: tuple[Suite, ...]
    choosing: Suite | None
    inputs: Mapping[str, str]
    identity: str


@dataclass(frozen=True)
class Job:
    """One run: the recipe, what its names stand for, and its folder; `original` is the model that
    the adapter is fused into, if not the one that is trained.

    The prompts of `choosing` choose a checkpoint, and are none of `suites`.

    A rehearsal with random weights is not `judged`: what it says is noise.
    """

    loaded: LoadedRecipe
    model: ResolvedModel
    suites: tuple[Suite, ...]
    inputs: Mapping[str, str]
    run: Path
    console: Console
    judged: bool = True
    choosing: Suite | None = None
    original: ResolvedModel | None = None

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @cached_property
    def rows(self) -> Mapping[str, FileRows]:
        """The rows of each split, replayed ones included: three stages look at them, and holding
        rows out takes a while.
        """
        from mlx_ft.data.sources import read_splits
        from mlx_ft.replay import with_replay

        return with_replay(read_splits(self.recipe.data), self.recipe, self.model, self.console)


def resolve(loaded: LoadedRecipe, console: Console) -> Resolved:
    """Look up model, data and suites; raises one InputError with the faults of all of them."""
    from mlx_ft.data import data_inputs
    from mlx_ft.evaluate.harness import thinking_faults
    from mlx_ft.evaluate.suites import load_suites
    from mlx_ft.selection import chooser, evaluated

    recipe = loaded.recipe
    faults: list[Fault] = []

    def attempt(work: Callable[[], T]) -> T | None:
        try:
            return work()
        except MlxFtError as error:
            faults.extend(error.faults)
            return None

    sources = attempt(lambda: data_inputs(recipe.data))
    suites = attempt(lambda: load_suites([Path(path) for path in recipe.eval.suites]))
    model = attempt(lambda: resolve_model(recipe.model, recipe.revision, console.say))
    base = recipe.export.base
    original = attempt(lambda: resolve_model(base, None, console.say)) if base else None
    start = attempt(lambda: start_sha256(recipe.train.resume_adapter_file))
    faults += missing_packages(recipe.train.report_to)
    choosing = attempt(lambda: chooser(recipe.train.select))
    asked = [*(suites or ()), *([choosing] if choosing else [])]
    faults += thinking_faults(asked, recipe.chat.enable_thinking)
    if suites is not None:
        faults += _gate_faults(loaded, suites)
    if suites is not None and choosing is not None:
        whole, chosen = suites, choosing
        suites = attempt(lambda: evaluated(whole, recipe.eval.suites, chosen))
    if faults or model is None or sources is None or suites is None:
        raise InputError(faults)
    suites = tuple(replace(suite, samples=suite.samples[: recipe.eval.limit]) for suite in suites)
    values = recipe.model_dump(mode="json", exclude=BESIDE_THE_RUN)
    # The weights in the file are what a run starts from, whatever the file is called.
    values["train"]["resume_adapter_file"] = start
    inputs = _stage_inputs(recipe, values, sources, model, original, suites, choosing)
    # Another gate judges the same run anew; it makes no other run.
    del values["eval"]["gates"]
    identity = hash_of([values, sources, model.identity])
    return Resolved(model, original, suites, choosing, inputs, identity)


def _gate_faults(loaded: LoadedRecipe, suites: Sequence[Suite]) -> list[Fault]:
    """Return a fault for every gate on a suite that the recipe does not measure."""
    from mlx_ft.evaluate.gates import gate_faults

    at = "eval.gates."
    places = {key.removeprefix(at): v for key, v in loaded.origins.items() if key.startswith(at)}
    return gate_faults(loaded.recipe.eval.parsed_gates(), suites, places)


def _stage_inputs(
    recipe: Recipe,
    values: Mapping[str, Any],
    sources: Mapping[str, Any],
    model: ResolvedModel,
    original: ResolvedModel | None,
    suites: Sequence[Suite],
    choosing: Suite | None,
) -> dict[str, str]:
    """Return stage -> hash; each stage's inputs contain those of the stage before."""
    versions = STAGE_VERSIONS
    data = hash_of([versions["data"], values["data"], values["chat"], sources, model.identity])
    select = None if choosing is None else choosing.file_sha256
    train = hash_of([versions["train"], data, values["train"], select])
    into = None if original is None else original.identity
    needs = fused_copy_needed_by(recipe.export, recipe.eval)
    export = hash_of([versions["export"], train, values["export"], into, needs])
    evaluation = hash_of(
        [versions["eval"], export, values["eval"], [suite.file_sha256 for suite in suites]]
    )
    return {"data": data, "train": train, "export": export, "eval": evaluation}


def probe_file(model: ResolvedModel) -> Path:
    """Return the file that says that `mlx-ft probe` has looked at this model."""
    return cache_home() / "probes" / f"{model.identity}.json"


def renderer(job: Job) -> ChatRenderer:
    """Return the renderer of the job's base model."""
    return _renderer_of(job.recipe, job.model)


def _renderer_of(recipe: Recipe, model: ResolvedModel) -> ChatRenderer:
    from mlx_ft.model.chat import ChatRenderer

    chat = recipe.chat
    return ChatRenderer.from_folder(
        model.path, enable_thinking=chat.enable_thinking, date=chat.date
    )


def show_rows(
    recipe: Recipe, console: Console, split: str, count: int, lines: Sequence[int]
) -> Iterator[ShownRow]:
    """Yield rows of a recipe as they would be trained; no run is begun."""
    from mlx_ft.data.show import shown_rows

    model = resolve_model(recipe.model, recipe.revision, console.say)
    yield from shown_rows(recipe.data, _renderer_of(recipe, model), split, count, lines)


def prepare_data(job: Job) -> None:
    """Render and count the rows into `data/`."""
    from mlx_ft import data

    with writing_stage(job.run, "data") as folder, job.console.progress("rows", 1.0) as line:
        summary = data.prepare_data(
            job.recipe.data, renderer(job), folder, job.console.say, job.rows, line.update
        )
        seal(folder, "data", job.inputs["data"], summary.info())


def preflight_facts(job: Job) -> PreflightInput:
    """Return what forecasts are made from; the data stage must be complete."""
    from mlx_ft import preflight

    return preflight.PreflightInput(
        recipe=job.recipe,
        data_stats=read_json(job.run / "data" / "stats.json"),
        model_config=job.model.config,
        model_bytes=job.model.size_bytes,
        machine=machine(),
        free_disk_bytes=free_disk_bytes(job.run),
    )


def _original_facts(job: Job) -> OriginalFacts | None:
    from mlx_ft.evaluate.fingerprint import check_fingerprint
    from mlx_ft.preflight import OriginalFacts

    if job.original is None:
        return None
    chat: list[str] = []
    try:
        trained, other = (_renderer_of(job.recipe, each) for each in (job.model, job.original))
        check_fingerprint(trained.fingerprint(), other.fingerprint())
    except ModelError as error:
        chat = [f"{fault.where}: {fault.found}" for fault in error.faults]
    return OriginalFacts(
        config=job.original.config,
        trained_shapes=dequantized_shapes(job.model.path, job.model.config),
        shapes=dequantized_shapes(job.original.path, job.original.config),
        chat_differences=tuple(chat),
    )


def _contaminated(job: Job) -> tuple[tuple[str, int, bool], ...]:
    """Return the suites' prompts that training rows hold; see PreflightInput."""
    from mlx_ft.data.contamination import contaminated_prompts, last_question

    asked = {
        f"{suite.name}/{sample.id}": last_question(sample.messages)
        for suite in (*job.suites, *([job.choosing] if job.choosing else []))
        for sample in suite.samples
    }
    if not asked:
        return ()
    found = contaminated_prompts(job.rows["train"].rows, asked)
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
    from mlx_ft.preflight import trained_context
    from mlx_ft.tokens import read_split

    there = trained_context(job.model.config)
    stats = read_json(job.run / "data" / "stats.json")["splits"]["train"]
    if there is None or stats["longest_kept"] <= there:
        return 0
    return int((read_split(job.run / "data" / "train.safetensors").lengths > there).sum())


def check(job: Job) -> None:
    """Run the preflight checks into `preflight.json`; raises when one of them fails."""
    from mlx_ft import preflight
    from mlx_ft.selection import selection_finding

    start = job.recipe.train.resume_adapter_file
    facts = replace(
        preflight_facts(job),
        contaminated=_contaminated(job),
        token_counts=_token_counts(job),
        probed=probe_file(job.model).exists(),
        original=_original_facts(job),
        start_shapes=None if start is None else start_shapes(start),
        rows_beyond_context=_rows_beyond_context(job),
    )
    findings = preflight.run_checks(facts)
    if job.choosing is not None:
        findings = (*findings, selection_finding(job.choosing, job.suites))
    write_json(job.run / "preflight.json", preflight.findings_json(findings))
    for finding in findings:
        say_finding(job.console, finding)
    preflight.raise_on_fail(findings)


def say_finding(console: Console, finding: Finding) -> None:
    """Print one finding of the checks as a line."""
    style = {"ok": None, "warn": "yellow", "fail": "red"}[finding.level]
    advice = f" - {finding.fix}" if finding.fix else ""
    console.say(f"  {finding.level:4} {finding.check}: {finding.measured}{advice}", style)


def manifest_info(job: Job, stage: str) -> Mapping[str, Any]:
    manifest = read_manifest(job.run / stage)
    if manifest is None:
        raise RunError(
            Fault(str(job.run / stage), "incomplete", "run the recipe again to finish it")
        )
    return manifest.info


def report(job: Job) -> None:
    """Write report.html from what is in the run folder."""
    from mlx_ft.report.html import write_report

    path = write_report(job.run)
    job.console.say(f"report: {path} ({format_bytes(path.stat().st_size)})")
