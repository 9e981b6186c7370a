"""Stage entry: choose the inputs of an export, run it, complete the READMEs of its folders.

Does: draw the rows for comparison and calibration, run the export, add its measurements to each
README, seal the stage.
Does not: fuse, quantize or verify (`build.py`), or import MLX before an export begins.
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
    from mlx_ft.export.build import ExportInputs

# Tokens of training rows for GPTQ. With 2,048 a model lost abilities that the rows do not show
# (LOG.md).
CALIBRATION_TOKENS = 6144
# Validation rows, and prompts of the suites, on which models are compared.
HELD_OUT_ROWS, ASKED_PROMPTS = 8, 8


def export(job: Job, suites: Sequence[Suite], original: ResolvedModel | None) -> None:
    """Fuse, dequantize, re-quantize and verify into `export/`."""
    from mlx_ft.export.build import export_model

    with writing_stage(job.folder, "export") as folder:
        info = export_model(export_inputs(job, suites, original, folder), job.console)
        _describe(job, folder, info)
        seal(folder, "export", job.inputs["export"], info)


def export_inputs(
    job: Job, suites: Sequence[Suite], original: ResolvedModel | None, folder: Path
) -> ExportInputs:
    """Return the inputs of the export of a trained run into `folder`.

    Raises RunError when the run is not trained yet.
    """
    from mlx_ft.export.build import ExportInputs
    from mlx_ft.export.survival.audit import Passages

    train_info = manifest_info(job, "train")
    held_out = _held_out_rows(job)
    return ExportInputs(
        name=job.recipe.name,
        base=job.model.path,
        adapter=job.folder / "train" / "adapter",
        folder=folder,
        adapted_modules=tuple(train_info["adapted_layers"]),
        parameters=train_info["total_parameters"],
        recipe=job.recipe.export,
        passages=Passages(
            held_out=[ids for ids, _ in held_out],
            trained=[trained for _, trained in held_out],
            prompts=_suite_prompts(job, suites),
        ),
        calibration=_calibration_rows(job) if job.recipe.export.q_method == "gptq" else (),
        card=lambda description: _introduction(job, description),
        fused_for=fused_copy_needed_by(job.recipe.export, job.recipe.eval),
        original=None if original is None else original.path,
    )


def _held_out_rows(job: Job) -> list[tuple[list[int], list[int]]]:
    """Return validation rows, on which models are compared.

    Of each: token ids, and the positions that predict a trained token.
    """
    from mlx_ft.data.tokens import read_split

    split = read_split(job.folder / "data" / "valid.safetensors")
    rows = [split.row(index) for index in range(min(HELD_OUT_ROWS, len(split)))]
    return [
        (
            [int(token) for token in ids[:512]],
            [at for at, flag in enumerate(trained[1:512]) if flag],
        )
        for ids, trained in rows
    ]


def _suite_prompts(job: Job, suites: Sequence[Suite]) -> list[list[int]]:
    """Return a few of the suites' prompts (ids), drawn evenly: text unlike the training rows."""
    samples = [sample for suite in suites for sample in suite.samples]
    chat = renderer(job)
    chosen = samples[:: max(1, -(-len(samples) // ASKED_PROMPTS))]
    prompts = [chat.prompt_ids(sample.messages, sample.tools) for sample in chosen]
    return [list(ids) for ids in prompts if len(ids) <= 512]


def _calibration_rows(job: Job) -> list[list[int]]:
    """Return training rows (ids) of about CALIBRATION_TOKENS tokens, drawn with a fixed seed."""
    import numpy as np

    from mlx_ft.data.tokens import read_split

    split = read_split(job.folder / "data" / "train.safetensors")
    rows: list[list[int]] = []
    for index in np.random.default_rng(0).permutation(len(split)):
        if sum(map(len, rows)) >= CALIBRATION_TOKENS:
            break
        rows.append([int(token) for token in split.row(int(index))[0][:512]])
    return rows


def _introduction(job: Job, description: str) -> str:
    """Return the beginning of a model folder's README, before the export's measurements."""
    lines = [
        f"# {job.recipe.name}",
        "",
        f"{job.model.name} (revision {job.model.revision[:12]}), fine-tuned with mlx-ft: "
        f"{description}.",
        "",
        "Load it with mlx-lm:",
        "",
        "    from mlx_lm import load, generate",
        '    model, tokenizer = load("path/to/this/folder")',
        "",
        *thinking_lines(job.recipe.chat.enable_thinking),
        "What was trained, how it was verified and how it scores is in the report of run "
        f"{job.folder.name}.",
    ]
    return "".join(f"{line}\n" for line in lines)


def _describe(job: Job, folder: Path, info: Mapping[str, Any]) -> None:
    """Add the export's measurements and the thinking mode to each model folder."""
    survival = read_json(folder / "survival.json")
    for column in ("fused", "quantized"):
        if info[column] is None:
            continue
        made = folder / info[column]["path"]
        write_thinking_mode(made, job.recipe.chat.enable_thinking)
        section = "".join(f"{line}\n" for line in export_section(info, survival, column))
        readme = made / "README.md"
        readme.write_text(f"{readme.read_text('utf-8')}\n{section}", encoding="utf-8")
