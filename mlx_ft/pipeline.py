"""The stages, in order; what is complete is skipped, what is unfinished is continued.

    data -> preflight -> base -> train -> export -> eval; then the report, however it ended

Does: find the run folder of a recipe, run each stage whose inputs are not already answered, and
keep run.json truthful whatever happens. Does not: know how a stage works (`stages.py` joins the
rooms).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_ft import exporting, measuring, stages, training
from mlx_ft.errors import Fault, GateFailed, Interrupted, MlxFtError
from mlx_ft.miniature import miniature_sets, write_miniature
from mlx_ft.recipe.load import LoadedRecipe
from mlx_ft.recipe.write import dump_resolved
from mlx_ft.rehearsal import rehearsal_sets
from mlx_ft.runs.clean import drop_fused
from mlx_ft.runs.folder import complete_stage, read_manifest, run_folder, taken_over, update_record
from mlx_ft.runs.lock import working
from mlx_ft.stages import Job
from mlx_ft.system.console import Console
from mlx_ft.system.environment import environment
from mlx_ft.system.files import disk_errors_explained, read_json, write_json
from mlx_ft.system.signals import interruptible
from mlx_ft.text.quantities import format_seconds
from mlx_ft.tracker_processes import tracked

LAST = "eval"
CHECKED = "preflight"
TRACKED = ("train", "eval")  # stages that measure what trackers are told
ENDINGS: Mapping[type, str] = {GateFailed: "gate_failed", Interrupted: "interrupted"}


@dataclass(frozen=True)
class Stage:
    """One stage: its name (and folder), what makes it, and what is said when it begins.

    `kept` stages are folders with a manifest; the others are done anew whenever any stage is.
    `shared` ones are taken over from a run that made the same of the same inputs.
    """

    name: str
    run: Callable[[Job], None]
    title: str
    kept: bool = True
    shared: bool = False


STAGES: tuple[Stage, ...] = (
    Stage("data", stages.prepare_data, "Data: rows to token ids", shared=True),
    Stage(CHECKED, stages.check, "Preflight: is anything wrong before training?", kept=False),
    Stage(
        "base", measuring.look_at_base, "Base: is the model sound before it is trained?", kept=False
    ),
    Stage("train", training.train, "Training", shared=True),
    Stage("export", exporting.export, "Export: fuse, dequantize, re-quantize, verify"),
    Stage("eval", measuring.evaluate, "Evaluation through the chat template"),
)
# A rehearsal's few rows would fail checks that the recipe's own rows have passed before it.
REHEARSED = tuple(stage for stage in STAGES if stage.kept)


def open_run(loaded: LoadedRecipe, runs_root: Path, console: Console) -> Job:
    """Resolve model, data and suites, and return the job with its run folder.

    Raises one error with the faults of all three.
    """
    resolved = stages.resolve(loaded, console)
    run = run_folder(runs_root, loaded.recipe.name, resolved.identity)
    return Job(
        loaded,
        resolved.model,
        resolved.suites,
        resolved.inputs,
        run,
        console,
        choosing=resolved.choosing,
        original=resolved.original,
    )


def run_pipeline(job: Job, until: str = LAST, of: Sequence[Stage] = STAGES) -> None:
    """Run the stages `of` up to `until`, then write the report.

    Whatever stops a stage is recorded in run.json, reported, and raised again.
    """
    unfinished = _unfinished(job, until, of)
    if not unfinished:
        return
    recipe = job.recipe.train
    told = recipe.report_to if any(stage.name in TRACKED for stage in unfinished) else ()
    with working(job.run):
        _begin(job)
        with tracked(job.run, told, recipe.project_name, job.console):
            _run_stages(job, unfinished)


def _run_stages(job: Job, unfinished: Sequence[Stage]) -> None:
    try:
        with interruptible():
            for stage in unfinished:
                _run_stage(job, stage)
    except KeyboardInterrupt:
        _end(job, "interrupted", "interrupted")
        raise Interrupted(
            Fault(str(job.run), "interrupted", "run the same command again to continue")
        ) from None
    except MlxFtError as error:
        _end(job, ENDINGS.get(type(error), "failed"), str(error))
        raise
    except BaseException as error:
        _end(job, "failed", f"{type(error).__name__}: {error}")
        raise
    whole = all(is_complete(job, stage.name) for stage in STAGES if stage.kept)
    _end(job, "done" if whole else "stopped", None)
    if whole and not job.recipe.export.keep_fused:
        drop_fused(job.run)


def _unfinished(job: Job, until: str, of: Sequence[Stage]) -> list[Stage]:
    """Return the stages to run: from the first kept one that is not complete, as far as `until`.

    When that is one that is not kept, such as the checks, it is always run.
    """
    names = [stage.name for stage in of]
    wanted = of[: names.index(until) + 1]
    missing = {s.name for s in wanted if s.kept and not is_complete(job, s.name)}
    if not missing and wanted[-1].kept and (until != LAST or _status(job) == "done"):
        return []
    return [stage for stage in wanted if not stage.kept or stage.name in missing]


def rehearse(open_with: Callable[[tuple[str, ...]], Job], miniature: bool) -> float:
    """Check a recipe, go through every stage of it made small, with a model made small as well if
    `miniature`; remove what that made, and return the seconds it took.

    `open_with` opens the recipe with settings added to it. What stops a rehearsal is raised, and
    its run folder then stays.
    """
    checked = open_with(())
    run_pipeline(checked, CHECKED)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mlx-ft-miniature-") as folder:
        small = rehearsal_sets(checked.recipe)
        if miniature:
            checked.console.heading(
                f"Miniature: two random layers like those of {checked.model.name}"
            )
            write_miniature(checked.model, Path(folder) / "model")
            layers = int(checked.model.config.get("num_hidden_layers", 0))
            small = (*small, *miniature_sets(checked.recipe, layers, Path(folder) / "model"))
        job = open_with(small)
        run_pipeline(replace(job, judged=not miniature), of=REHEARSED)
        shutil.rmtree(job.run)
    return time.perf_counter() - started


def fitted(open_with: Callable[[tuple[str, ...]], Job]) -> Job:
    """Open a recipe with the settings that its training needs to fit into this machine's memory."""
    from mlx_ft.preflight import fitting_sets

    job = open_with(())
    run_pipeline(job, "data")
    sets = fitting_sets(stages.preflight_facts(job))
    if not sets:
        return job
    job.console.say(f"--fit sets {', '.join(sets)}", "yellow")
    return open_with(sets)


def is_complete(job: Job, stage: str) -> bool:
    """Return whether a stage's folder was made from this job's inputs and is whole."""
    return complete_stage(job.run, stage, job.inputs[stage]) is not None


def is_done(job: Job) -> bool:
    """Return whether every stage is complete and the run has ended well."""
    return not _unfinished(job, LAST, STAGES)


def _status(job: Job) -> str | None:
    try:
        status = read_json(job.run / "run.json")["status"]
    except (OSError, ValueError, KeyError):
        return None
    return str(status)


def _begin(job: Job) -> None:
    """Write down what runs where, before anything does."""
    with disk_errors_explained(job.run):
        (job.run / "recipe.yaml").write_text(dump_resolved(job.loaded), encoding="utf-8")
        recipe: Mapping[str, object] = {
            "recipe": job.recipe.model_dump(mode="json"),
            "origins": dict(job.loaded.origins),
            "file": str(job.loaded.file),
        }
        write_json(job.run / "recipe.json", recipe)
        update_record(
            job.run,
            status="running",
            exit_reason=None,
            environment=environment(),
            model=job.model.info(),
            inputs=dict(job.inputs),
        )


def _end(job: Job, status: str, reason: str | None) -> None:
    """Record how the run ended, and report it; neither may hide the error that ended it."""
    try:
        update_record(job.run, status=status, exit_reason=reason)
        stages.report(job)
    except (OSError, MlxFtError) as error:
        job.console.say(f"{job.run}: the end of the run could not be recorded ({error})", "red")


def _run_stage(job: Job, stage: Stage) -> None:
    job.console.heading(stage.title)
    started = time.perf_counter()
    with disk_errors_explained(job.run):
        other = _take_over(job, stage)
        if other is None:
            stage.run(job)
        seconds = time.perf_counter() - started
        peak = _peak_memory_bytes(job, stage)
        record = {"seconds": seconds, "peak_memory_bytes": peak, "reused": other is not None}
        update_record(job.run, stages={stage.name: record})
    job.console.say(f"{stage.name} done in {format_seconds(seconds)}")


def _take_over(job: Job, stage: Stage) -> Path | None:
    """Return the run that a stage was taken over from, unless it is begun here already."""
    if not stage.shared or (job.run / f"{stage.name}.tmp").exists():
        return None
    other = taken_over(job.run, stage.name, job.inputs[stage.name])
    if other is not None:
        job.console.say(f"taken over from {other.name}, which made it of the same inputs")
    return other


def _peak_memory_bytes(job: Job, stage: Stage) -> int | None:
    """Return MLX's peak as the stage's manifest says it, else in this process since the stage reset
    it; None when MLX is not in use.
    """
    manifest = read_manifest(job.run / stage.name)
    if manifest is not None and "peak_memory_bytes" in manifest.info:
        return int(manifest.info["peak_memory_bytes"])
    if "mlx.core" not in sys.modules:
        return None
    import mlx.core as mx

    return int(mx.get_peak_memory())
