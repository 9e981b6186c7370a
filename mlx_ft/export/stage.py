"""The export joined to its room: what of a run goes in, what is said in the folders that come out.

Does: draw the rows that models are compared on and calibrated with, hand over folders, write what
was found into them, seal.
Does not: fuse, quantize or verify (`export/`), or import MLX before an export begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_ft.export.card import export_section, thinking_lines
from mlx_ft.job import Job, manifest_info, renderer
from mlx_ft.model.resolve import ResolvedModel
from mlx_ft.model.thinking_mode import write_thinking_mode
from mlx_ft.recipe.export import fused_copy_needed_by
from mlx_ft.runs.folder import seal, writing_stage
from mlx_ft.system.files import read_json

if TYPE_CHECKING:  # importing it would load MLX
    from mlx_ft.evaluate.suites import Suite
    from mlx_ft.export.build import ExportJob

# What GPTQ sees of the training rows; with 2,048 a model forgot what the rows do not show (LOG.md).
CALIBRATION_TOKENS = 6144
# What models are compared on in the export: validation rows, and prompts of the suites.
HELD_OUT_ROWS, ASKED_PROMPTS = 8, 8


def export(job: Job, suites: Sequence[Suite], original: ResolvedModel | None) -> None:
    """Fuse, dequantize, re-quantize and verify into `export/`."""
    from mlx_ft.export.build import export_model

    with writing_stage(job.run, "export") as folder:
        info = export_model(export_job(job, suites, original, folder), job.console)
        _describe(job, folder, info)
        seal(folder, "export", job.inputs["export"], info)


def export_job(
    job: Job, suites: Sequence[Suite], original: ResolvedModel | None, folder: Path
) -> ExportJob:
    """Return what the export of a trained run is made from, into `folder`.

    Raises RunError when the run is not trained yet.
    """
    from mlx_ft.export.build import ExportJob

    train_info = manifest_info(job, "train")
    prompts = _fixed_prompts(job)
    return ExportJob(
        name=job.recipe.name,
        base=job.model.path,
        adapter=job.run / "train" / "adapter",
        folder=folder,
        adapted_modules=tuple(train_info["adapted_layers"]),
        parameters=train_info["total_parameters"],
        recipe=job.recipe.export,
        prompts=[ids for ids, _ in prompts],
        trained=[trained for _, trained in prompts],
        asked=_asked_prompts(job, suites),
        calibration=_calibration_rows(job) if job.recipe.export.q_method == "gptq" else (),
        card=lambda what: _introduction(job, what),
        fused_for=fused_copy_needed_by(job.recipe.export, job.recipe.eval),
        original=None if original is None else original.path,
    )


def _fixed_prompts(job: Job) -> list[tuple[list[int], list[int]]]:
    """Return whole conversations from the validation rows, on which models are compared: ids, and
    the positions after which a trained token comes.
    """
    from mlx_ft.data.tokens import read_split

    split = read_split(job.run / "data" / "valid.safetensors")
    rows = [split.row(index) for index in range(min(HELD_OUT_ROWS, len(split)))]
    return [
        (
            [int(token) for token in ids[:512]],
            [at for at, flag in enumerate(trained[1:512]) if flag],
        )
        for ids, trained in rows
    ]


def _asked_prompts(job: Job, suites: Sequence[Suite]) -> list[list[int]]:
    """Return a few of the suites' prompts, drawn evenly: text unlike the training rows."""
    samples = [sample for suite in suites for sample in suite.samples]
    chat = renderer(job)
    chosen = samples[:: max(1, -(-len(samples) // ASKED_PROMPTS))]
    prompts = [chat.prompt_ids(sample.messages, sample.tools) for sample in chosen]
    return [list(ids) for ids in prompts if len(ids) <= 512]


def _calibration_rows(job: Job) -> list[list[int]]:
    """Return training rows, drawn alike in every run, of about CALIBRATION_TOKENS tokens."""
    import numpy as np

    from mlx_ft.data.tokens import read_split

    split = read_split(job.run / "data" / "train.safetensors")
    rows: list[list[int]] = []
    for index in np.random.default_rng(0).permutation(len(split)):
        if sum(map(len, rows)) >= CALIBRATION_TOKENS:
            break
        rows.append([int(token) for token in split.row(int(index))[0][:512]])
    return rows


def _introduction(job: Job, what: str) -> str:
    """Return how the README of a model folder begins; what the export found comes behind it."""
    lines = [
        f"# {job.recipe.name}",
        "",
        f"{job.model.name} (revision {job.model.revision[:12]}), fine-tuned with mlx-ft: {what}.",
        "",
        "Load it with mlx-lm:",
        "",
        "    from mlx_lm import load, generate",
        '    model, tokenizer = load("path/to/this/folder")',
        "",
        *thinking_lines(job.recipe.chat.enable_thinking),
        "What was trained, how it was verified and how it scores is in the report of run "
        f"{job.run.name}.",
    ]
    return "".join(f"{line}\n" for line in lines)


def _describe(job: Job, folder: Path, info: Mapping[str, Any]) -> None:
    """Complete each model folder of an export by what was found, and by the thinking mode."""
    survival = read_json(folder / "survival.json")
    for column in ("fused", "quantized"):
        if info[column] is None:
            continue
        made = folder / info[column]["path"]
        write_thinking_mode(made, job.recipe.chat.enable_thinking)
        section = "".join(f"{line}\n" for line in export_section(info, survival, column))
        readme = made / "README.md"
        readme.write_text(f"{readme.read_text('utf-8')}\n{section}", encoding="utf-8")
