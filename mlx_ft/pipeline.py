"""START HERE: the six stages in order; skip what is complete, resume what is not, then report.

    recipe.yaml -> OpenRun: the recipe, the model on disk, the suites, the run folder
    data        rows (JSONL, CSV, ...) -> data/: token ids, loss masks, statistics
    preflight   facts about rows, model and machine -> preflight.json; a failed check stops
    base        suites -> the base model's answers; a broken base stops
    train       data/ -> train/: an adapter, checkpoints, metrics; degenerate samples stop
    export      adapter -> export/: float16 and 5-bit models; a lost training stops
    eval        suites -> eval/: answers and scores of each model; a failed gate stops
    report.html is written however the run ends

Does: find out which stages are complete, run the others, keep run.json true whatever happens.
Does not: know how a stage works (the stage file of each package and `preflight/base_model.py` do).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_ft.data import stage as data_stage
from mlx_ft.errors import (
    Fault,
    GateFailed,
    Interrupted,
    MlxFtError,
)
from mlx_ft.evaluate import stage as evaluate_stage
from mlx_ft.export import stage as export_stage
from mlx_ft.inputs import OpenRun
from mlx_ft.job import Job
from mlx_ft.preflight import base_model
from mlx_ft.preflight import stage as preflight_stage
from mlx_ft.recipe.write import dump_resolved
from mlx_ft.report.trackers.processes import tracked
from mlx_ft.runs.clean import drop_fused
from mlx_ft.runs.folder import (
    complete_stage,
    read_manifest,
    taken_over,
    update_record,
)
from mlx_ft.runs.lock import working
from mlx_ft.runs.names import KEPT_STAGES, StageName
from mlx_ft.system.awake import awake
from mlx_ft.system.environment import environment
from mlx_ft.system.files import disk_errors_explained, read_json, write_json
from mlx_ft.system.signals import interruptible
from mlx_ft.text.quantities import format_bytes, format_seconds
from mlx_ft.train import stage as train_stage

LAST: StageName = "eval"
PREFLIGHT: StageName = "preflight"
TRACKED: tuple[StageName, ...] = ("train", "eval")  # stages with metrics that trackers follow
ENDINGS: Mapping[type, str] = {GateFailed: "gate_failed", Interrupted: "interrupted"}


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    name: its name in run.json, and of its folder.
    make: runs the stage.
    title: the heading when it begins.
    reusable: a run with the same inputs may have made it; its folder is then copied.
    """

    name: StageName
    make: Callable[[OpenRun], None]
    title: str
    reusable: bool = False

    @property
    def has_folder(self) -> bool:
        """Whether it leaves a folder with a manifest; others run again whenever any stage runs."""
        return self.name in KEPT_STAGES


def _data(run: OpenRun) -> None:
    data_stage.prepare_data(run.job, run.rows)


def _preflight(run: OpenRun) -> None:
    preflight_stage.check(run.job, run.rows["train"], run.suites, run.choosing, run.original)


def _base(run: OpenRun) -> None:
    base_model.check_base(run.job, run.suites)


def _train(run: OpenRun) -> None:
    train_stage.train(run.job, run.rows["valid"], run.choosing)


def _export(run: OpenRun) -> None:
    export_stage.export(run.job, run.suites, run.original)


def _eval(run: OpenRun) -> None:
    evaluate_stage.evaluate(run.job, run.suites)


STAGES: tuple[Stage, ...] = (
    Stage("data", _data, "Data: rows to token ids", reusable=True),
    Stage(PREFLIGHT, _preflight, "Preflight: is anything wrong before training?"),
    Stage("base", _base, "Base: is the model sound before it is trained?"),
    Stage("train", _train, "Training", reusable=True),
    Stage("export", _export, "Export: fuse, dequantize, re-quantize, verify"),
    Stage("eval", _eval, "Evaluation through the chat template"),
)


def run_pipeline(run: OpenRun, until: str = LAST, stages: Sequence[Stage] = STAGES) -> None:
    """Run `stages` up to and with `until`, then write the report.

    Whatever stops a stage is recorded in run.json, reported, and raised again.
    """
    job = run.job
    unfinished = _unfinished(job, until, stages)
    if not unfinished:
        return
    recipe = job.recipe.train
    trackers = recipe.report_to if any(stage.name in TRACKED for stage in unfinished) else ()
    with working(job.folder), awake() as kept_awake:
        if kept_awake:
            job.console.say("this Mac stays awake until the run ends (an open lid assumed)")
        _begin(job)
        with tracked(job.folder, trackers, recipe.project_name, job.console):
            _run_stages(run, unfinished)


def _run_stages(run: OpenRun, unfinished: Sequence[Stage]) -> None:
    job = run.job
    try:
        with interruptible():
            for stage in unfinished:
                _run_stage(run, stage)
    except KeyboardInterrupt:
        _end(job, "interrupted", "interrupted")
        raise Interrupted(
            Fault(str(job.folder), "interrupted", "run the same command again to continue")
        ) from None
    except MlxFtError as error:
        _end(job, ENDINGS.get(type(error), "failed"), str(error))
        raise
    except BaseException as error:
        _end(job, "failed", f"{type(error).__name__}: {error}")
        raise
    whole = all(is_complete(job, stage.name) for stage in STAGES if stage.has_folder)
    _end(job, "done" if whole else "stopped", None)
    if whole and not job.recipe.export.keep_fused:
        drop_fused(job.folder)


def _unfinished(job: Job, until: str, stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages to run, as far as `until`.

    These are the incomplete ones, and all without a folder, such as the checks. A complete stage
    stays: its inputs contain those of the stages before it. Nothing runs when all are complete,
    unless `until` itself has no folder, or the run has not ended well.
    """
    names: list[str] = [stage.name for stage in stages]
    wanted = stages[: names.index(until) + 1]
    missing = {s.name for s in wanted if s.has_folder and not is_complete(job, s.name)}
    if not missing and wanted[-1].has_folder and (until != LAST or _status(job) == "done"):
        return []
    return [stage for stage in wanted if not stage.has_folder or stage.name in missing]


def fitted(open_with: Callable[[tuple[str, ...]], OpenRun]) -> OpenRun:
    """Open a recipe with the settings that its training needs to fit into this machine's memory."""
    from mlx_ft.preflight.fit import fitting_sets

    run = open_with(())
    run_pipeline(run, "data")
    sets = fitting_sets(preflight_stage.preflight_facts(run.job))
    if not sets:
        return run
    run.job.console.say(f"--fit sets {', '.join(sets)}", "yellow")
    return open_with(sets)


def is_complete(job: Job, stage: str) -> bool:
    """Return whether a stage's folder was made from this job's inputs and is whole."""
    return complete_stage(job.folder, stage, job.inputs[stage]) is not None


def is_done(job: Job) -> bool:
    """Return whether every stage is complete and the run has ended well."""
    return not _unfinished(job, LAST, STAGES)


def _status(job: Job) -> str | None:
    try:
        status = read_json(job.folder / "run.json")["status"]
    except (OSError, ValueError, KeyError):
        return None
    return str(status)


def _begin(job: Job) -> None:
    """Write down what runs where, before anything does."""
    with disk_errors_explained(job.folder):
        (job.folder / "recipe.yaml").write_text(dump_resolved(job.loaded), encoding="utf-8")
        recipe: Mapping[str, object] = {
            "recipe": job.recipe.model_dump(mode="json"),
            "origins": dict(job.loaded.origins),
            "file": str(job.loaded.file),
        }
        write_json(job.folder / "recipe.json", recipe)
        update_record(
            job.folder,
            status="running",
            exit_reason=None,
            environment=environment(),
            model=job.model.info(),
            inputs=dict(job.inputs),
        )


def _end(job: Job, status: str, reason: str | None) -> None:
    """Record how the run ended, and report it; neither may hide the error that ended it."""
    try:
        update_record(job.folder, status=status, exit_reason=reason)
        _report(job)
    except (OSError, MlxFtError) as error:
        job.console.say(f"{job.folder}: the end of the run could not be recorded ({error})", "red")


def _run_stage(run: OpenRun, stage: Stage) -> None:
    job = run.job
    job.console.heading(stage.title)
    started = time.perf_counter()
    with disk_errors_explained(job.folder):
        other = _take_over(job, stage)
        if other is None:
            stage.make(run)
        seconds = time.perf_counter() - started
        peak = _peak_memory_bytes(job, stage)
        record = {"seconds": seconds, "peak_memory_bytes": peak, "reused": other is not None}
        update_record(job.folder, stages={stage.name: record})
    job.console.say(f"{stage.name} done in {format_seconds(seconds)}")


def _take_over(job: Job, stage: Stage) -> Path | None:
    """Return the run that a stage was taken over from, unless it is begun here already."""
    if not stage.reusable or (job.folder / f"{stage.name}.tmp").exists():
        return None
    other = taken_over(job.folder, stage.name, job.inputs[stage.name])
    if other is not None:
        job.console.say(f"taken over from {other.name}, which made it of the same inputs")
    return other


def _peak_memory_bytes(job: Job, stage: Stage) -> int | None:
    """Return MLX's peak as the stage's manifest says it, else in this process since the stage reset
    it; None when MLX is not in use.
    """
    manifest = read_manifest(job.folder / stage.name)
    if manifest is not None and "peak_memory_bytes" in manifest.info:
        return int(manifest.info["peak_memory_bytes"])
    if "mlx.core" not in sys.modules:
        return None
    import mlx.core as mx

    return int(mx.get_peak_memory())


def _report(job: Job) -> None:
    """Write report.html from what is in the run folder."""
    from mlx_ft.report.html import write_report

    path = write_report(job.folder)
    job.console.say(f"report: {path} ({format_bytes(path.stat().st_size)})")
