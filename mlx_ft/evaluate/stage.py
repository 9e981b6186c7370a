"""Stage entry: a run's columns answer its suites; gates judge.

Does not: score (`harness.py`), or decide when it runs (`pipeline.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault, GateFailed, RunError
from mlx_ft.evaluate import gates, sample_log
from mlx_ft.evaluate.column import Column
from mlx_ft.evaluate.local_model import ModelSource, local_column
from mlx_ft.evaluate.suites import Suite
from mlx_ft.job import Job, manifest_info
from mlx_ft.model.chat import ChatFormat
from mlx_ft.runs.folder import seal, writing_stage
from mlx_ft.system.cache import cache_home
from mlx_ft.system.console import Console, Progress
from mlx_ft.system.files import hash_of, write_json


def answers_folder() -> Path:
    """Return where answers of base models are kept between runs."""
    return cache_home() / "answers"


def column_source(job: Job, column: str) -> ModelSource:
    """Return where the model of an evaluation column is."""
    folder, adapter = job.model.path, None
    if column == "adapter":
        adapter = job.folder / "train" / "adapter"
    elif column != "base":
        made = manifest_info(job, "export")[column]
        if made is None:
            fix = "set export.keep_fused: true and run again"
            raise RunError(Fault(str(job.folder / "export"), f"has no {column} model", fix))
        folder = job.folder / "export" / made["path"]
    return ModelSource(folder, adapter, ChatFormat.of(job.recipe.chat))


def run_column(job: Job, column: str) -> Column:
    """Return a column of a run; its chat format must be the one that the rows have."""
    stage = "train" if column == "adapter" else "export"
    is_base = column == "base"
    return local_column(
        column,
        column_source(job, column),
        job.model.identity if is_base else hash_of([column, job.inputs[stage]]),
        batch_size=job.recipe.eval.batch_size,
        trained_with=manifest_info(job, "data")["fingerprint"],
        reusable=is_base,
    )


def evaluate(job: Job, suites: Sequence[Suite]) -> None:
    """Ask every suite of every column into `eval/`, and judge the answers by the gates.

    The rendering must be the one trained with. Raises GateFailed when a gate does not hold. The
    answers then stay in `eval.tmp/`, and judging them again asks nothing again.
    """
    if not suites:
        job.console.say("the recipe names no suites, so nothing is measured", "yellow")
    columns = job.recipe.eval.columns
    with writing_stage(job.folder, "eval", keep_partial=True) as folder:
        _keep_answers(job.folder / "eval", folder)
        results = ask_suites(job, suites, columns, folder)
        _judge(job, suites, results, folder)
        seal(folder, "eval", job.inputs["eval"], {"suites": list(results["suites"])})


def _keep_answers(finished: Path, folder: Path) -> None:
    """Copy the answers of a finished evaluation that is to be made anew, such as for other gates.

    Those that still answer the same questions are not asked for again.
    """
    for path in sorted(finished.glob("*/*.jsonl")):
        target = folder / path.parent.name / path.name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copy2(path, target)


def _judge(job: Job, suites: Sequence[Suite], results: dict[str, Any], folder: Path) -> None:
    """Judge the results into results.json, and say so; raises GateFailed unless all gates hold."""
    scored = results["suites"]
    records = {
        suite: {each: sample_log.recover(folder / suite / f"{each}.jsonl") for each in columns}
        for suite, columns in scored.items()
    }
    margins = {suite.name: suite.margin for suite in suites if suite.margin is not None}
    judged = gates.judge(job.recipe.eval.parsed_gates(), margins, scored, records)
    entries = gates.judgements_json(judged)
    write_json(folder / "results.json", {**results, "gates": entries})
    for entry in entries:
        word, style = ("holds", None) if entry["passed"] else ("fails", "red")
        unsettled = entry["passed"] and not entry["settled"]
        job.console.say(f"  {word:5} {gates.described(entry)}", "yellow" if unsettled else style)
    faults = gates.gate_faults_of(judged)
    if faults and job.judged:
        raise GateFailed(faults)


def ask_suites(
    job: Job, suites: Sequence[Suite], columns: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Have all suites answered by these columns into a folder; answers that are there are kept."""
    # It loads scipy, which no other stage needs.
    from mlx_ft.evaluate.harness import evaluate as evaluate_suites

    with suite_progress(job.console, suites, len(columns)) as progress:
        results = evaluate_suites(
            suites,
            [run_column(job, column) for column in columns],
            folder,
            progress=progress,
            cache_folder=answers_folder(),
        )
    for warning in results["warnings"]:
        job.console.say(f"warning: {warning}", "yellow")
    return results


def suite_progress(
    console: Console, suites: Sequence[Suite], columns: int
) -> AbstractContextManager[Progress]:
    """Return the progress line of an evaluation; its total is all answers of all columns."""
    total = columns * sum(len(suite.samples) for suite in suites)
    return console.progress("evaluation", max(1, total))
