"""The export, step by step: fuse, dequantize, re-quantize, and verify each against the one
before.

Does: order the steps, say what is done and for how long, hand over what was made. Does not: compute
(`fuse.py`, `gptq.py`), write weights (`write_weights.py`), or compare (`verify_logits.py`).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ft.engine.load import release
from mlx_ft.export.bit_widths import Bits, described_quantization
from mlx_ft.export.fuse import Float16Overflow, FusedModel, fuse
from mlx_ft.export.gguf import write_gguf
from mlx_ft.export.layerwise_models import layers_fault
from mlx_ft.export.model_folder import begin_folder, finish_folder
from mlx_ft.export.original import require_same_shapes
from mlx_ft.export.quantize import Method, Quantized, quantize_into
from mlx_ft.export.safetensors_writer import WeightsWriter
from mlx_ft.export.survival.audit import Passages, Stored, audit_layers
from mlx_ft.export.survival.verdict import (
    SURVIVAL_FILE,
    Survival,
    in_words,
    next_bits,
    require_survival,
    survival_json,
)
from mlx_ft.export.verify_checks import (
    Check,
    check_bits,
    check_copied,
    check_fused_layers,
    checks_info,
    require_all,
)
from mlx_ft.export.verify_models import Compared, Steps, compare_models
from mlx_ft.export.write_weights import Observer, half_layouts
from mlx_ft.model.resolve import read_config
from mlx_ft.model.safetensors_headers import dequantized_shapes
from mlx_ft.recipe.export import FOR_GGUF
from mlx_ft.recipe.names import BASE
from mlx_ft.recipe.schema import ExportRecipe
from mlx_ft.system.console import Console
from mlx_ft.system.files import require_free_bytes, write_json
from mlx_ft.text.quantities import format_bytes

FUSED_FOLDER = "fused-f16"
# A block is 32 codes and a 16-bit scale; q4_0 files keep the embeddings in q8_0, up to all of it.
GGUF_BYTES_PER_PARAMETER = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 34 / 32}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Freed arrays that MLX may hold on to meanwhile.
CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class ExportJob:
    """What is exported: `base` and `adapter` folders into `folder`.

    Models are compared on `prompts` (ids), held-out rows of which `trained` are the positions that
    predict a trained token, and on `asked` (ids), prompts of suites.
    `original` is the 16-bit original of the base, if the adapter is to be fused into that.
    `fused_for` are the needs of a 16-bit folder; without any there will be none. `calibration` rows
    (ids) show q_method gptq what goes into the layers. `name` is that of a GGUF file, without its
    ending. `observe` is shown all rows that the adapter changed, before and after.
    """

    name: str
    base: Path
    adapter: Path
    folder: Path
    adapted_modules: tuple[str, ...]
    parameters: int
    recipe: ExportRecipe
    prompts: Sequence[Sequence[int]]
    trained: Sequence[Sequence[int]]
    asked: Sequence[Sequence[int]]
    calibration: Sequence[Sequence[int]]
    card: Callable[[str], str]
    fused_for: tuple[str, ...] = ("export.keep_fused",)
    original: Path | None = None
    observe: Observer | None = field(default=None, compare=False)

    @property
    def fused_into(self) -> Path:
        """The folder that the adapter is fused into."""
        return self.base if self.original is None else self.original

    @property
    def passages(self) -> Passages:
        """What models are compared on."""
        return Passages(self.prompts, self.trained, self.asked)


def needed_bytes(
    parameters: int, recipe: ExportRecipe, fused_for: Sequence[str], half_parameters: int = 0
) -> int:
    """Return the disk that the export takes: the quantized copy, of which some stay 16-bit, the
    GGUF, and 16 bits a parameter if something needs that copy.

    Each quantization group carries a 16-bit scale and a 16-bit bias.
    """
    quantized = recipe.most_bits / 8 + 4 / recipe.q_group_size
    per_parameter = quantized + (2 if fused_for else 0)
    if recipe.gguf is not None:
        per_parameter += GGUF_BYTES_PER_PARAMETER[recipe.gguf]
    return int((parameters * per_parameter + half_parameters * (2 - quantized)) * 1.05)


def _half_parameters(folder: Path, group_size: int) -> int:
    """Return the parameters of a model that lie in rows which are not whole groups."""
    shapes = dequantized_shapes(folder, read_config(folder)).values()
    return sum(math.prod(shape) for shape in shapes if shape and shape[-1] % group_size)


def export_model(job: ExportJob, console: Console) -> dict[str, Any]:
    """Write and verify the model folders; return the stage's hand-over.

    Raises RunError for the disk, GateFailed when a step does not equal the one before.
    """
    mx.reset_peak_memory()
    half = _half_parameters(job.base, job.recipe.q_group_size)
    needed = needed_bytes(job.parameters, job.recipe, job.fused_for, half)
    require_free_bytes(job.folder, needed, "the export")
    with _small_cache():
        if job.original is not None:
            require_same_shapes(job.base, job.original)
        fault = layers_fault(job.base, job.adapter, max([*job.prompts, *job.calibration], key=len))
        release()
        if fault is not None:
            console.say(f"the whole model is held in memory: {fault}", "yellow")
        made, compared, checks = _made_and_audited(job, fault is None, console)
        gguf = _write_gguf(job, console)
    return _handed_over(job, made, compared, checks, gguf, console)


def _made_and_audited(
    job: ExportJob, by_layers: bool, console: Console
) -> tuple[_Made, Compared, list[Check]]:
    """Write, verify and audit; with other bits again, if the recipe leaves them open and too little
    survived. Raises GateFailed; survival.json is there by then.
    """
    made: _Made | None = None
    found: Survival | None = None
    while bits := next_bits(job.recipe, found):
        if made is not None:
            shutil.rmtree(made.small_folder)
        made = _write_in_range(job, bits, made, by_layers, console)
        release()
        compared = _compare(job, made, by_layers, console)
        found = _audit(job, made, compared, by_layers, console)
        write_json(job.folder / SURVIVAL_FILE, survival_json(found, job.recipe, made.dtype))
        for line in in_words(found):
            console.say(line)
    assert made is not None and found is not None, "the first bits are always tried"
    checks = [*_checks_of_files(job, made), *compared.checks]
    for check in checks:
        console.say(f"  {'ok ' if check.ok else 'NOT'} {check.check}: {check.measured}")
    for line in compared.lines:
        console.say(f"  {line}")
    require_survival(found, job.recipe)
    require_all(checks)
    return made, compared, checks


def _audit(
    job: ExportJob, made: _Made, compared: Compared, by_layers: bool, console: Console
) -> Survival:
    started = time.perf_counter()
    stored = Stored(made.fused, made.small_folder, job.recipe.q_group_size)
    with console.progress("survival", 1.0) as line:
        layers = audit_layers(
            stored,
            job.passages,
            by_layers,
            lambda done, of: line.update(done / of, f"layer {done} of {of}"),
        )
    seconds = time.perf_counter() - started
    held_out, prompts = (compared.from_adapter[name] for name in ("held_out", "prompts"))
    return Survival(
        made.bits, held_out.get(BASE), held_out, prompts, layers, compared.positions, seconds
    )


@dataclass(frozen=True)
class _Made:
    """What was written: the fused model, its bytes (None: not written), the quantized one, and why
    the type is not the recipe's, if so.
    """

    bits: Bits
    small_folder: Path
    fused: FusedModel
    dtype: str
    dtype_reason: str | None
    fused_bytes: int | None
    quantized: Quantized


@contextmanager
def _small_cache() -> Iterator[None]:
    before = mx.set_cache_limit(CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
        release()


def _write_in_range(
    job: ExportJob, bits: Bits, before: _Made | None, by_layers: bool, console: Console
) -> _Made:
    """Write both folders; again, in bfloat16, when a number turns out to be beyond float16.

    Not that tensor alone: MLX computes in float32 from where both types meet, and what a number of
    that size is multiplied with leaves float16 as well. The 16-bit folder is there already if there
    was one `before`, with other bits.
    """
    if before is not None:
        return _write(job, bits, before, before.dtype, before.dtype_reason, by_layers, console)
    try:
        return _write(job, bits, None, job.recipe.dtype, None, by_layers, console)
    except Float16Overflow as overflow:
        reason = f"{overflow}: the whole model is kept in bfloat16"
        console.say(reason, "yellow")
        for folder in (FUSED_FOLDER, bits.folder):
            shutil.rmtree(job.folder / folder, ignore_errors=True)
        return _write(job, bits, None, "bfloat16", reason, by_layers, console)


def _write(
    job: ExportJob,
    bits: Bits,
    before: _Made | None,
    dtype: str,
    reason: str | None,
    by_layers: bool,
    console: Console,
) -> _Made:
    if before is None:
        copy = f"kept for {', '.join(job.fused_for)}" if job.fused_for else "not written"
        console.say(f"fusing the adapter, dequantizing to {dtype} ({copy})")
    console.say(_quantization_line(job, bits))
    fused = fuse(job.fused_into, job.adapter, dtype)
    method = Method(job.recipe, bits, job.calibration, by_layers)
    small, half = job.folder / bits.folder, job.folder / FUSED_FOLDER
    fused_bytes = None if before is None else before.fused_bytes
    if job.fused_for and before is None:
        begin_folder(half)
        with WeightsWriter(half, half_layouts(fused)) as writer:
            quantized = quantize_into(small, fused, method, writer, console, job.observe)
            fused_bytes = writer.finish()
        finish_folder(half, job.base, fused.config, job.card(f"{dtype} weights, adapter fused"))
    else:
        quantized = quantize_into(small, fused, method, None, console, job.observe)
    if quantized.compensated:
        console.say(
            f"{len(quantized.compensated)} of {len(quantized.modules)} layers by GPTQ, the others "
            "rounded"
        )
    group_size, others = job.recipe.q_group_size, quantized.others_in_words
    made_of = f"{bits}-bit weights, groups of {group_size}"
    if others:
        why = f"their rows are not whole groups of {group_size} (export.q_group_size)"
        console.say(f"{others}: {why}", "yellow")
        made_of += f", {others}"
    card = job.card(made_of)
    finish_folder(small, job.base, described_quantization(fused.config, bits, group_size), card)
    return _Made(bits, small, fused, dtype, reason, fused_bytes, quantized)


def _quantization_line(job: ExportJob, bits: Bits) -> str:
    tokens = sum(len(row) for row in job.calibration)
    how = {"gptq": f"by GPTQ on {tokens:,} tokens of training rows", "round": "weight by weight"}
    return (
        f"re-quantizing to {bits} bits, groups of {job.recipe.q_group_size}, "
        f"{how[job.recipe.q_method]}"
    )


def _checks_of_files(job: ExportJob, made: _Made) -> list[Check]:
    small = made.small_folder
    folders = [small] if made.fused_bytes is None else [job.folder / FUSED_FOLDER, small]
    return [
        check_fused_layers(made.fused.fused_modules, job.adapted_modules),
        check_bits(small, made.quantized.modules, made.bits, len(made.quantized.half)),
        *(check_copied(job.base, folder, TOKENIZER_FILES) for folder in folders),
    ]


def _compare(job: ExportJob, made: _Made, by_layers: bool, console: Console) -> Compared:
    console.say("verifying each step against the one before")
    with console.progress("verifying", 1.0) as line:
        return compare_models(
            Steps(
                base=job.base,
                adapter=job.adapter,
                original=job.original,
                fused=made.fused,
                fused_folder=None if made.fused_bytes is None else job.folder / FUSED_FOLDER,
                small_folder=made.small_folder,
                bits=made.bits,
                group_size=job.recipe.q_group_size,
            ),
            job.passages,
            by_layers,
            lambda share: line.update(share, ""),
        )


def _write_gguf(job: ExportJob, console: Console) -> dict[str, Any] | None:
    """Write the verified 16-bit model as GGUF if the recipe asks for one, and say what it is."""
    kind = job.recipe.gguf
    if kind is None:
        return None
    console.say(f"writing {job.name}.gguf ({kind})")
    file = job.folder / f"{job.name}.gguf"
    total_bytes = write_gguf(job.folder / FUSED_FOLDER, file, kind)
    console.say(f"GGUF {format_bytes(total_bytes)}")
    return {"path": file.name, "bytes": total_bytes, "kind": kind}


def _handed_over(
    job: ExportJob,
    made: _Made,
    compared: Compared,
    checks: Sequence[Check],
    gguf: dict[str, Any] | None,
    console: Console,
) -> dict[str, Any]:
    """Return what the stage's manifest says; a 16-bit copy that was for the GGUF alone goes."""
    fused_info: dict[str, Any] | None = None
    if made.fused_bytes is not None:
        fused_info = {"path": FUSED_FOLDER, "bytes": made.fused_bytes}
    if job.fused_for == (FOR_GGUF,):
        shutil.rmtree(job.folder / FUSED_FOLDER)
        fused_info = None
    sizes = [] if fused_info is None else [f"fused {format_bytes(fused_info['bytes'])}"]
    console.say(", ".join([*sizes, f"quantized {format_bytes(made.quantized.size_bytes)}"]))
    return {
        "gguf": gguf,
        "checks": checks_info(checks),
        "fused": fused_info,
        "dtype": made.dtype,
        "dtype_reason": made.dtype_reason,
        "original": compared.both_ways,
        "quantized": {
            "path": made.small_folder.name,
            "bytes": made.quantized.size_bytes,
            "bits": made.bits.usual,
            "raised": dict(made.bits.raised),
            "group_size": job.recipe.q_group_size,
            "method": job.recipe.q_method,
            "half_layers": len(made.quantized.half),
            "gptq_layers": len(made.quantized.compensated),
        },
        "peak_memory_bytes": int(mx.get_peak_memory()),
    }
