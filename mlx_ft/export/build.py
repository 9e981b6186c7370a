"""Fuse, dequantize, re-quantize, and verify each step against the one before, in order.

Does: order the steps, narrate them, return the info of the stage's manifest.
Does not: compute (`fuse.py`, `gptq.py`), write weights (`write_weights.py`), or compare models
(`verify_logits.py`).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_ft.engine.load import release
from mlx_ft.export.bit_widths import Bits, described_quantization
from mlx_ft.export.fuse import Float16Overflow, FusedModel, fuse
from mlx_ft.export.gguf import write_gguf
from mlx_ft.export.layerwise_models import layerwise_fault
from mlx_ft.export.model_folder import begin_folder, finish_folder
from mlx_ft.export.original import require_same_shapes
from mlx_ft.export.quantize import Method, Quantized, quantize_into
from mlx_ft.export.safetensors_writer import WeightsWriter
from mlx_ft.export.survival.audit import Passages, Stored, audit_layers
from mlx_ft.export.survival.verdict import (
    SURVIVAL_FILE,
    Survival,
    next_bits,
    require_survival,
    summary_lines,
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
# Freed arrays that MLX may keep during an export (bytes).
CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class ExportInputs:
    """Inputs of one export.

    name: name of a GGUF file, without its ending.
    base, adapter: folders of the trained base and its adapter.
    folder: where the model folders are written.
    adapted_modules: modules that the adapter changes.
    parameters: parameters of the model.
    recipe: the recipe's export section.
    passages: rows and prompts on which models are compared.
    calibration: rows (ids) for q_method gptq.
    card: description of a model folder -> how its README begins.
    fused_for: the reasons to write a 16-bit folder (empty: none is written).
    original: the 16-bit original of the base, to fuse the adapter into (None: the base).
    observe: shown all rows that the adapter changed, before and after.
    """

    name: str
    base: Path
    adapter: Path
    folder: Path
    adapted_modules: tuple[str, ...]
    parameters: int
    recipe: ExportRecipe
    passages: Passages
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
    def fused_folder(self) -> Path:
        """The folder of the 16-bit model, if there is one."""
        return self.folder / FUSED_FOLDER

    @property
    def longest_row(self) -> Sequence[int]:
        """The longest of the held-out and calibration rows."""
        return max([*self.passages.held_out, *self.calibration], key=len)


def needed_bytes(
    parameters: int, recipe: ExportRecipe, fused_for: Sequence[str], half_parameters: int = 0
) -> int:
    """Return the disk space that the export takes (bytes).

    It is the quantized copy, of which `half_parameters` stay 16-bit, the GGUF, and 16 bits a
    parameter if the 16-bit folder is written. Each quantization group has a 16-bit scale and a
    16-bit bias.
    """
    quantized = recipe.most_bits / 8 + 4 / recipe.q_group_size
    per_parameter = quantized + (2 if fused_for else 0)
    if recipe.gguf is not None:
        per_parameter += GGUF_BYTES_PER_PARAMETER[recipe.gguf]
    return int((parameters * per_parameter + half_parameters * (2 - quantized)) * 1.05)


def _half_parameters(folder: Path, group_size: int) -> int:
    """Return the number of a model's parameters in rows that are not whole groups."""
    shapes = dequantized_shapes(folder, read_config(folder)).values()
    return sum(math.prod(shape) for shape in shapes if shape and shape[-1] % group_size)


def export_model(inputs: ExportInputs, console: Console) -> dict[str, Any]:
    """Write and verify the model folders; return the info of the stage's manifest.

    Raises RunError for the disk, GateFailed when a step does not equal the one before.
    """
    mx.reset_peak_memory()
    half = _half_parameters(inputs.base, inputs.recipe.q_group_size)
    needed = needed_bytes(inputs.parameters, inputs.recipe, inputs.fused_for, half)
    require_free_bytes(inputs.folder, needed, "the export")
    with small_cache():
        if inputs.original is not None:
            require_same_shapes(inputs.base, inputs.original)
        fault = layerwise_fault(inputs.base, inputs.adapter, inputs.longest_row)
        release()
        if fault is not None:
            console.say(f"the whole model is held in memory: {fault}", "yellow")
        build = Build(inputs, console, by_layers=fault is None)
        verified = build.write_and_verify()
        gguf = build.add_gguf()
    return build.manifest_info(verified, gguf)


@contextmanager
def small_cache() -> Iterator[None]:
    """Keep MLX from holding on to more freed memory than CACHE_BYTES."""
    before = mx.set_cache_limit(CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
        release()


@dataclass(frozen=True)
class _HalfType:
    """The 16-bit type of a model: its name, and why it is not the recipe's (None: it is)."""

    name: str
    reason: str | None = None


@dataclass(frozen=True)
class _Written:
    """The models that were written.

    bits, small_folder, quantized: the quantized model. fused: the fused model. half_type: its type.
    fused_bytes: size of its folder's weights (None: not written).
    """

    bits: Bits
    small_folder: Path
    fused: FusedModel
    half_type: _HalfType
    fused_bytes: int | None
    quantized: Quantized


@dataclass(frozen=True)
class _Verified:
    """Models that passed: the written models, their checks, the comparison with the original."""

    written: _Written
    checks: Sequence[Check]
    original: dict[str, Any] | None


@dataclass(frozen=True)
class Build:
    """One export in progress.

    inputs: its inputs. console: where it is narrated. by_layers: models run one layer at a time;
    otherwise they are wholly in memory.
    """

    inputs: ExportInputs
    console: Console
    by_layers: bool

    def write_and_verify(self) -> _Verified:
        """Write, compare and audit the models; judge them.

        If the recipe leaves the bits open, more bits are tried until enough survives. Raises
        GateFailed, after survival.json is written.
        """
        inputs, console = self.inputs, self.console
        written: _Written | None = None
        found: Survival | None = None
        while bits := next_bits(inputs.recipe, found):
            if written is not None:
                shutil.rmtree(written.small_folder)
            written = self.write(bits, written)
            release()
            compared = self._compare(written)
            found = self._audit(written, compared)
            dtype = written.half_type.name
            write_json(inputs.folder / SURVIVAL_FILE, survival_json(found, inputs.recipe, dtype))
            for line in summary_lines(found):
                console.say(line)
        assert written is not None and found is not None, "the first bits are always tried"
        checks = [*self._file_checks(written), *compared.checks]
        for check in checks:
            console.say(f"  {'ok ' if check.ok else 'NOT'} {check.check}: {check.measured}")
        for line in compared.lines:
            console.say(f"  {line}")
        require_survival(found, inputs.recipe)
        require_all(checks)
        return _Verified(written, checks, compared.original)

    def write(self, bits: Bits, before: _Written | None = None) -> _Written:
        """Write both folders; again, in bfloat16, when a number turns out to be beyond float16.

        Not that tensor alone: MLX computes in float32 from where both types meet, and products
        with a number of that size leave float16 as well.
        before: the models of an earlier try with other bits, whose 16-bit folder is kept.
        """
        if before is not None:
            return self._write(bits, before.half_type, before)
        try:
            return self._write(bits, _HalfType(self.inputs.recipe.dtype), None)
        except Float16Overflow as overflow:
            reason = f"{overflow}: the whole model is kept in bfloat16"
            self.console.say(reason, "yellow")
            for folder in (FUSED_FOLDER, bits.folder):
                shutil.rmtree(self.inputs.folder / folder, ignore_errors=True)
            return self._write(bits, _HalfType("bfloat16", reason), None)

    def _write(self, bits: Bits, half_type: _HalfType, before: _Written | None) -> _Written:
        inputs, console, dtype = self.inputs, self.console, half_type.name
        if before is None:
            copy = f"kept for {', '.join(inputs.fused_for)}" if inputs.fused_for else "not written"
            console.say(f"fusing the adapter, dequantizing to {dtype} ({copy})")
        console.say(self._quantization_line(bits))
        fused = fuse(inputs.fused_into, inputs.adapter, dtype)
        method = Method(inputs.recipe, bits, inputs.calibration, self.by_layers)
        small, half = inputs.folder / bits.folder, inputs.fused_folder
        fused_bytes = None if before is None else before.fused_bytes
        if inputs.fused_for and before is None:
            begin_folder(half)
            with WeightsWriter(half, half_layouts(fused)) as writer:
                quantized = quantize_into(small, fused, method, writer, console, inputs.observe)
                fused_bytes = writer.finish()
            card = inputs.card(f"{dtype} weights, adapter fused")
            finish_folder(half, inputs.base, fused.config, card)
        else:
            quantized = quantize_into(small, fused, method, None, console, inputs.observe)
        self._finish_quantized(small, fused.config, bits, quantized)
        return _Written(bits, small, fused, half_type, fused_bytes, quantized)

    def _finish_quantized(
        self, folder: Path, config: Mapping[str, Any], bits: Bits, quantized: Quantized
    ) -> None:
        """Complete the quantized folder, and narrate which layers were quantized how."""
        if quantized.compensated:
            self.console.say(
                f"{len(quantized.compensated)} of {len(quantized.modules)} layers by GPTQ, the "
                "others rounded"
            )
        group_size, half_summary = self.inputs.recipe.q_group_size, quantized.half_summary
        description = f"{bits}-bit weights, groups of {group_size}"
        if half_summary:
            why = f"their rows are not whole groups of {group_size} (export.q_group_size)"
            self.console.say(f"{half_summary}: {why}", "yellow")
            description += f", {half_summary}"
        card = self.inputs.card(description)
        finish_folder(
            folder, self.inputs.base, described_quantization(config, bits, group_size), card
        )

    def _quantization_line(self, bits: Bits) -> str:
        tokens = sum(len(row) for row in self.inputs.calibration)
        methods = {
            "gptq": f"by GPTQ on {tokens:,} tokens of training rows",
            "round": "weight by weight",
        }
        return (
            f"re-quantizing to {bits} bits, groups of {self.inputs.recipe.q_group_size}, "
            f"{methods[self.inputs.recipe.q_method]}"
        )

    def _compare(self, written: _Written) -> Compared:
        inputs = self.inputs
        self.console.say("verifying each step against the one before")
        steps = Steps(
            base=inputs.base,
            adapter=inputs.adapter,
            original=inputs.original,
            fused=written.fused,
            fused_folder=None if written.fused_bytes is None else inputs.fused_folder,
            small_folder=written.small_folder,
            bits=written.bits,
            group_size=inputs.recipe.q_group_size,
        )
        with self.console.progress("verifying", 1.0) as progress:
            return compare_models(steps, inputs.passages, self.by_layers, progress)

    def _audit(self, written: _Written, compared: Compared) -> Survival:
        started = time.perf_counter()
        stored = Stored(written.fused, written.small_folder, self.inputs.recipe.q_group_size)
        with self.console.progress("survival", 1.0) as progress:
            layers = audit_layers(stored, self.inputs.passages, self.by_layers, progress)
        seconds = time.perf_counter() - started
        held_out, prompts = (compared.from_adapter[name] for name in ("held_out", "prompts"))
        return Survival(
            written.bits,
            held_out.get(BASE),
            held_out,
            prompts,
            layers,
            compared.positions,
            seconds,
        )

    def _file_checks(self, written: _Written) -> list[Check]:
        """Check layers, bits and copied files, as read back from the written folders."""
        inputs, small = self.inputs, written.small_folder
        folders = [small] if written.fused_bytes is None else [inputs.fused_folder, small]
        quantized = written.quantized
        return [
            check_fused_layers(written.fused.fused_modules, inputs.adapted_modules),
            check_bits(small, quantized.modules, written.bits, len(quantized.half)),
            *(check_copied(inputs.base, folder, TOKENIZER_FILES) for folder in folders),
        ]

    def add_gguf(self) -> dict[str, Any] | None:
        """Write the verified 16-bit model as GGUF, if the recipe asks for one.

        Returns its entry in the manifest (None: not asked for).
        """
        kind = self.inputs.recipe.gguf
        if kind is None:
            return None
        file = self.inputs.folder / f"{self.inputs.name}.gguf"
        self.console.say(f"writing {file.name} ({kind})")
        total_bytes = write_gguf(self.inputs.fused_folder, file, kind)
        self.console.say(f"GGUF {format_bytes(total_bytes)}")
        return {"path": file.name, "bytes": total_bytes, "kind": kind}

    def manifest_info(self, verified: _Verified, gguf: dict[str, Any] | None) -> dict[str, Any]:
        """Return the info of the stage's manifest.

        Removes a 16-bit folder that was needed for the GGUF alone.
        """
        inputs, written = self.inputs, verified.written
        fused_info: dict[str, Any] | None = None
        if written.fused_bytes is not None:
            fused_info = {"path": FUSED_FOLDER, "bytes": written.fused_bytes}
        if inputs.fused_for == (FOR_GGUF,):
            shutil.rmtree(inputs.fused_folder)
            fused_info = None
        sizes = [] if fused_info is None else [f"fused {format_bytes(fused_info['bytes'])}"]
        quantized = written.quantized
        self.console.say(", ".join([*sizes, f"quantized {format_bytes(quantized.size_bytes)}"]))
        return {
            "gguf": gguf,
            "checks": checks_info(verified.checks),
            "fused": fused_info,
            "dtype": written.half_type.name,
            "dtype_reason": written.half_type.reason,
            "original": verified.original,
            "quantized": {
                "path": written.small_folder.name,
                "bytes": quantized.size_bytes,
                "bits": written.bits.usual,
                "raised": dict(written.bits.raised),
                "group_size": inputs.recipe.q_group_size,
                "method": inputs.recipe.q_method,
                "half_layers": len(quantized.half),
                "gptq_layers": len(quantized.compensated),
            },
            "peak_memory_bytes": int(mx.get_peak_memory()),
        }
