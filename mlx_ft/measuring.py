"""A run's models asked: the suites before training and after it, and whoever wants to talk to one.

Does: open the model of each column, join the evaluation room to the run folder, and say whether the
base is sound. Does not: score, or decide when (`pipeline.py`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_ft.console import Console, ProgressLine
from mlx_ft.degenerate import degenerate_reason
from mlx_ft.errors import Fault, RunError
from mlx_ft.evaluate.sample_log import recover as read_rows
from mlx_ft.hardware import format_bytes
from mlx_ft.models import resolve_model
from mlx_ft.recipe import ChatRecipe
from mlx_ft.runs import drop_from_stage, hash_of, read_json, seal, write_json, writing_stage
from mlx_ft.stages import Job, manifest_info, probe_file, renderer, say_finding

if TYPE_CHECKING:
    from mlx_ft.inference import LoadedModel


def column_folder(job: Job, column: str) -> tuple[Path, Path | None]:
    """Return (model folder, adapter folder or None) of an evaluation column."""
    if column == "base":
        return job.model.path, None
    if column == "adapter":
        return job.model.path, job.run / "train" / "adapter"
    made = manifest_info(job, "export")[column]
    if made is None:
        fix = "set export.keep_fused: true and run again"
        raise RunError(Fault(str(job.run / "export"), f"has no {column} model", fix))
    return job.run / "export" / made["path"], None


@contextmanager
def open_column(job: Job, column: str) -> Iterator[LoadedModel]:
    """Load a column's model for a while."""
    from mlx_ft.inference import load_model, release

    folder, adapter = column_folder(job, column)
    chat = job.recipe.chat
    loaded = load_model(
        folder, adapter=adapter, enable_thinking=chat.enable_thinking, date=chat.date
    )
    try:
        yield loaded
    finally:
        del loaded
        release()


def evaluate(job: Job) -> None:
    """Ask every suite of every column into `eval/`; the rendering must be the one trained with."""
    if not job.suites:
        job.console.say("the recipe names no suites, so nothing is measured", "yellow")
    columns = job.recipe.eval.columns
    with writing_stage(job.run, "eval", keep_partial=True) as folder:
        results = _ask(job, columns, folder)
        seal(folder, "eval", job.inputs["eval"], {"suites": list(results["suites"])})
    _drop_fused(job)


def _drop_fused(job: Job) -> None:
    """Delete the 16-bit model once nothing needs it any more, unless the recipe keeps it."""
    fused = manifest_info(job, "export")["fused"]
    if job.recipe.export.keep_fused or fused is None:
        return
    drop_from_stage(job.run / "export", fused["path"], fused=None)
    job.console.say(f"deleted the 16-bit model, {format_bytes(fused['bytes'])}")


def look_at_base(job: Job) -> None:
    """Ask the base model what it will be asked at the end, and add to `preflight.json` whether it
    is sound; raises when it is not. Its answers are kept for the evaluation.
    """
    from mlx_ft import preflight

    if not job.suites or "base" not in job.recipe.eval.columns:
        return
    folder = job.run / "eval.tmp"
    folder.mkdir(exist_ok=True)
    results = _ask(job, ["base"], folder)
    answers = [
        (str(row["id"]), str(row["text"]))
        for suite in results["suites"]
        for row in read_rows(folder / suite / "base.jsonl")
    ]
    looping = [(name, why) for name, text in answers if (why := degenerate_reason(text, None))]
    finding = preflight.base_health(len(answers), looping, job.recipe.preflight.accept)
    stored = read_json(job.run / "preflight.json")
    others = [each for each in stored["findings"] if each["check"] != finding.check]
    write_json(
        job.run / "preflight.json",
        {**stored, "findings": [*others, *preflight.findings_json([finding])["findings"]]},
    )
    say_finding(job.console, finding)
    preflight.raise_on_fail([finding])


def _ask(job: Job, columns: Sequence[str], folder: Path) -> dict[str, Any]:
    """Have all suites answered by these columns into a folder; what is there already is kept."""
    from mlx_ft.evaluate.harness import evaluate as evaluate_suites
    from mlx_ft.inference import generate

    weights = {
        "base": job.model.identity,
        "adapter": job.inputs["train"],
        "fused": job.inputs["export"],
        "quantized": job.inputs["export"],
    }
    with _suite_progress(job, len(columns)) as progress:
        return evaluate_suites(
            job.suites,
            columns,
            lambda column: open_column(job, column),
            folder,
            renderer=renderer(job),
            fingerprint=manifest_info(job, "data")["fingerprint"],
            model_sha256={name: hash_of([name, weights[name]]) for name in weights},
            generate=generate,
            batch_size=job.recipe.eval.batch_size,
            progress=progress,
        )


@contextmanager
def _suite_progress(job: Job, columns: int) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a progress function that adds up the samples of all suites and columns."""
    samples = sum(len(suite.samples) for suite in job.suites)
    total = samples * columns
    answered: dict[str, int] = {}
    with job.console.progress("evaluation", max(1, total)) as line:

        def progress(done: int, of: int, what: str) -> None:
            answered[what] = done
            line.update(sum(answered.values()), f"{what}: {done} of {of} samples")

        yield progress


def chat_turns(job: Job, column: str, max_tokens: int, lines: Iterable[str]) -> Iterator[str]:
    """Yield the answer of one of the run's models to each line, remembering the conversation.

    An empty line ends it. Raises RunError when the run has no such model yet.
    """
    from mlx_ft.console import printable
    from mlx_ft.inference import generate

    messages: list[dict[str, str]] = []
    with open_column(job, column) as loaded:
        job.console.say(f"{job.run.name}, {column}; an empty line ends it")
        for line in lines:
            if not line.strip():
                return
            messages.append({"role": "user", "content": line.rstrip("\n")})
            prompt = loaded.renderer.prompt_ids(messages)
            (answer,) = generate(loaded, [prompt], max_tokens=max_tokens)
            messages.append({"role": "assistant", "content": answer.text})
            yield printable(answer.text)


def _done(line: ProgressLine, done: int, of: int, what: str) -> None:
    line.update(done, f"{done} of {of}")


def probe(
    name: str,
    revision: str | None,
    enable_thinking: bool,
    suites: Sequence[Path],
    console: Console,
) -> None:
    """Look at a model and measure it with suites, then write down that this was done.

    Raises GateFailed when its answers are degenerate.
    """
    from mlx_ft.evaluate.harness import evaluate_column
    from mlx_ft.evaluate.suites import load_suites
    from mlx_ft.inference import generate, load_model, release
    from mlx_ft.probe import probe_model

    loaded_suites = load_suites(list(suites))
    model = resolve_model(name, revision, console.say)
    console.say(f"looking at {model.name} ({model.path})")
    loaded = load_model(
        model.path, adapter=None, enable_thinking=enable_thinking, date=ChatRecipe().date
    )
    probe_model(model, loaded, probe_file(model), console)
    with tempfile.TemporaryDirectory(prefix="mlx-ft-probe-") as folder:
        for suite in loaded_suites:
            with console.progress(suite.name, len(suite.samples)) as line:
                result = evaluate_column(
                    suite,
                    "base",
                    loaded,
                    Path(folder),
                    model_sha256=model.identity,
                    generate=generate,
                    batch_size=16,
                    progress=partial(_done, line),
                )
            mean = result.summary["mean"]
            console.say(f"{suite.name}: {mean:.2f} over {len(suite.samples)} prompts")
    del loaded
    release()
