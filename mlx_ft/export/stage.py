"""The export, step by step: fuse, dequantize, re-quantize, and verify each against the one
before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_model as mlx_lm_load_model

from mlx_ft.console import Console
from mlx_ft.export.folders import write_model_folder
from mlx_ft.export.fuse import DTYPES, cast_floats, fuse, quantize
from mlx_ft.export.gguf import write_gguf
from mlx_ft.export.gptq import quantize_layers
from mlx_ft.export.verify import (
    Check,
    Logits,
    check_bits,
    check_copied,
    check_fused,
    check_fused_layers,
    check_quantized,
    checks_info,
    prompt_logits,
    require_all,
)
from mlx_ft.hardware import format_bytes
from mlx_ft.inference import attach_adapter, load_weights, release
from mlx_ft.recipe import ExportRecipe
from mlx_ft.runs import require_free_bytes

FUSED_FOLDER = "fused-f16"
# A block is 32 codes and a 16-bit scale; q4_0 files keep the embeddings in q8_0, up to all of it.
GGUF_BYTES_PER_PARAMETER = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 34 / 32}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class ExportJob:
    """What is exported: `base` and `adapter` folders into `folder`, compared on `prompts` (ids).

    `calibration` rows (ids) show q_method gptq what goes into the layers. `name` is that of a GGUF
    file, without its ending.
    """

    name: str
    base: Path
    adapter: Path
    folder: Path
    adapted_modules: tuple[str, ...]
    parameters: int
    recipe: ExportRecipe
    prompts: Sequence[Sequence[int]]
    calibration: Sequence[Sequence[int]]
    card: Callable[[str], str]


def quantized_folder(recipe: ExportRecipe) -> str:
    """Return the quantized model's folder name, such as q5."""
    return f"q{recipe.q_bits}"


def needed_bytes(parameters: int, recipe: ExportRecipe) -> int:
    """Return the disk that the export takes: 16 bits a parameter, the quantized copy, the GGUF.

    Each quantization group carries a 16-bit scale and a 16-bit bias.
    """
    per_parameter = recipe.q_bits / 8 + 4 / recipe.q_group_size
    if recipe.gguf is not None:
        per_parameter += GGUF_BYTES_PER_PARAMETER[recipe.gguf]
    return int(parameters * (2 + per_parameter) * 1.05)


def export_model(job: ExportJob, console: Console) -> dict[str, Any]:
    """Write and verify both model folders; return the stage's hand-over.

    Raises RunError for the disk, GateFailed when a step does not equal the one before.
    """
    mx.reset_peak_memory()
    require_free_bytes(job.folder, needed_bytes(job.parameters, job.recipe), "the export")
    fused_folder = job.folder / FUSED_FOLDER
    small_folder = job.folder / quantized_folder(job.recipe)

    console.say(f"fusing the adapter, dequantizing to {job.recipe.dtype}")
    fused = fuse(job.base, job.adapter, job.recipe.dtype)
    card = job.card(f"{job.recipe.dtype} weights, adapter fused")
    fused_bytes = write_model_folder(fused_folder, job.base, fused.model, fused.config, card)
    fused_modules, fused_config = fused.fused_modules, fused.config
    del fused
    release()

    console.say(_quantization_line(job))
    quantized_modules, compensated, small_bytes = _write_quantized(
        fused_folder, small_folder, fused_config, job, console
    )
    if compensated:
        console.say(
            f"{len(compensated)} of {len(quantized_modules)} layers by GPTQ, the others rounded"
        )
    console.say("verifying each step against the one before")
    checks = [
        check_fused_layers(fused_modules, job.adapted_modules),
        check_bits(small_folder, quantized_modules, job.recipe.q_bits),
        check_copied(job.base, fused_folder, TOKENIZER_FILES),
        check_copied(job.base, small_folder, TOKENIZER_FILES),
        *_compare_logits(job, fused_folder, small_folder),
    ]
    for check in checks:
        console.say(f"  {'ok ' if check.ok else 'NOT'} {check.check}: {check.measured}")
    require_all(checks)
    console.say(f"fused {format_bytes(fused_bytes)}, quantized {format_bytes(small_bytes)}")
    return {
        "gguf": _write_gguf(job, fused_folder, console),
        "checks": checks_info(checks),
        "fused": {"path": FUSED_FOLDER, "bytes": fused_bytes},
        "quantized": {
            "path": small_folder.name,
            "bytes": small_bytes,
            "bits": job.recipe.q_bits,
            "group_size": job.recipe.q_group_size,
            "method": job.recipe.q_method,
            "gptq_layers": len(compensated),
        },
        "peak_memory_bytes": int(mx.get_peak_memory()),
    }


def _write_gguf(job: ExportJob, fused_folder: Path, console: Console) -> dict[str, Any] | None:
    """Write the verified 16-bit model as GGUF if the recipe asks for one, and say what it is."""
    kind = job.recipe.gguf
    if kind is None:
        return None
    console.say(f"writing {job.name}.gguf ({kind})")
    file = job.folder / f"{job.name}.gguf"
    total_bytes = write_gguf(fused_folder, file, kind)
    console.say(f"GGUF {format_bytes(total_bytes)}")
    return {"path": file.name, "bytes": total_bytes, "kind": kind}


def _quantization_line(job: ExportJob) -> str:
    tokens = sum(len(row) for row in job.calibration)
    how = {"gptq": f"by GPTQ on {tokens:,} tokens of training rows", "round": "weight by weight"}
    return (
        f"re-quantizing to {job.recipe.q_bits} bits, groups of {job.recipe.q_group_size}, "
        f"{how[job.recipe.q_method]}"
    )


def _write_quantized(
    fused_folder: Path,
    small_folder: Path,
    config: dict[str, Any],
    job: ExportJob,
    console: Console,
) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """Quantize the model as it lies on disk, so that what is verified is what was written.

    Returns all quantized modules, those of them that GPTQ did, and the bytes of the weights.
    """
    recipe = job.recipe
    compensated: tuple[str, ...] = ()
    if recipe.q_method == "gptq":
        model, _, _ = load_weights(fused_folder)
        with console.progress("quantizing", 1.0) as line:
            compensated = quantize_layers(
                model,
                job.calibration,
                recipe.q_bits,
                recipe.q_group_size,
                DTYPES[recipe.dtype],
                lambda done, of: line.update(done / of, f"layer {done} of {of}"),
            )
        cast_floats(model, DTYPES[recipe.dtype])
    else:
        model, _ = mlx_lm_load_model(fused_folder, lazy=True, trust_remote_code=False)
    model, described, modules = quantize(
        model, config, recipe.q_bits, recipe.q_group_size, compensated
    )
    card = job.card(f"{recipe.q_bits}-bit weights, groups of {recipe.q_group_size}")
    total_bytes = write_model_folder(small_folder, job.base, model, described, card)
    del model
    release()
    return modules, compensated, total_bytes


def _logits(folder: Path, adapter: Path | None, prompts: Sequence[Sequence[int]]) -> list[Logits]:
    model, _, _ = load_weights(folder)
    if adapter is not None:
        attach_adapter(model, adapter)
    result = prompt_logits(model, prompts)
    del model
    release()
    return result


def _compare_logits(job: ExportJob, fused_folder: Path, small_folder: Path) -> list[Check]:
    adapter = _logits(job.base, job.adapter, job.prompts)
    fused = _logits(fused_folder, None, job.prompts)
    quantized = _logits(small_folder, None, job.prompts)
    return [check_fused(adapter, fused), check_quantized(fused, quantized, job.recipe.q_bits)]
