"""Each part of an export by itself, at the shape of Llama-3.2-3B: a table for docs/benchmarks.md.

A random model in 4 bits with a random rank-8 adapter on its top 12 layers. Seconds and MLX's peak
are measured here. The last column is a FORECAST for Metal, by the rule of `forecast_seconds`; none
of it was measured. Verification and audit go through the model layer by layer, as the export does.

Usage: python -m tests.benchmarks.export_parts [--work DIR] [--layers N] [--prompts N]
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx_ft  # noqa: F401  # first: it loads OpenBLAS before mlx is imported
from tests.benchmarks.export import PROMPT_TOKENS, write_model
from tests.benchmarks.shapes import LLAMA_3B

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_ft.export.build import Build, ExportInputs

# An Apple M2 as its maker describes it, but for the rate of products, which is the usual share of
# the nominal 3.6 TFLOP/s.
DISK_BYTES_PER_SECOND = 1.5e9
MEMORY_BYTES_PER_SECOND = 100e9
FLOP_PER_SECOND = 2.5e12


@dataclass(frozen=True)
class Work:
    """What a part has to move and compute: bytes on the disk and in memory, products."""

    disk_bytes: float
    memory_bytes: float = 0.0
    flop: float = 0.0


def forecast_seconds(work: Work) -> float:
    """Return a forecast for Metal: disk, memory and products one after the other."""
    return (
        work.disk_bytes / DISK_BYTES_PER_SECOND
        + work.memory_bytes / MEMORY_BYTES_PER_SECOND
        + work.flop / FLOP_PER_SECOND
    )


def works(weights: float, positions: int, models: int) -> dict[str, Work]:
    """Return the work of each part for so many weights, positions and compared models.

    A weight takes 4.5 bits in the base, 16 fused and 5.5 quantized. Expanding reads it, writes and
    reads float32, and writes 16 bits.
    """
    base, half, small = (weights * bits / 8 for bits in (4.5, 16, 5.5))
    expanded = base + 8 * weights + half
    product = 2 * weights * positions
    return {
        "proof": Work(3 * base, 3 * (expanded + 4 * weights), 3 * 2 * weights * PROMPT_TOKENS),
        "fuse": Work(base, expanded),
        "half": Work(base + half, expanded),
        "small": Work(base + small, expanded + half + small),
        "both": Work(base + half + small, expanded + half + small),
        "compare": Work(
            2 * base + half + small + (models - 4) * base,
            models * (expanded + 4 * weights),
            models * product,
        ),
        "audit": Work(base + small, 8 * expanded, product),
    }


def inputs_in(work: Path, model: Path, prompts: int) -> "ExportInputs":
    import numpy as np

    from tests.support.exports import export_inputs

    generator = np.random.default_rng(0)
    rows = [[int(t) for t in generator.integers(3, 300, PROMPT_TOKENS)] for _ in range(prompts)]
    return export_inputs(
        model,
        model / "adapter",
        work / "made",
        held_out=rows,
        trained=[range(PROMPT_TOKENS // 2, PROMPT_TOKENS - 1)] * prompts,
        q_group_size=64,
        q_method="round",
        min_survival=None,
    )


def computed_parts(inputs: "ExportInputs", use: "Callable[[str, int, mx.array], None]") -> None:
    """Fuse, expand and round to float16, part by part; hand each part over."""
    import mlx.core as mx

    from mlx_ft.export.fuse import fuse

    for name, weight in fuse(inputs.base, inputs.adapter, "float16").weights.items():
        for first, end in weight.ranges:
            rows = weight.half_rows(first, end)
            mx.eval(rows)
            use(name, first, rows)
            mx.clear_cache()
        weight.forget()


def half_folder(inputs: "ExportInputs") -> None:
    from mlx_ft.export.fuse import fuse
    from mlx_ft.export.model_folder import begin_folder
    from mlx_ft.export.safetensors_writer import WeightsWriter
    from mlx_ft.export.write_weights import half_layouts

    folder = inputs.folder / "half"
    begin_folder(folder)
    layouts = half_layouts(fuse(inputs.base, inputs.adapter, "float16"))
    with WeightsWriter(folder, layouts) as writer:
        computed_parts(inputs, writer.write)
        writer.finish()


def small_folder(inputs: "ExportInputs", build: "Build") -> None:
    from mlx_ft.export.bit_widths import Bits
    from mlx_ft.export.fuse import fuse
    from mlx_ft.export.quantize import Method, quantize_into

    fused = fuse(inputs.base, inputs.adapter, "float16")
    method = Method(inputs.recipe, Bits(5), (), True)
    quantize_into(inputs.folder / "small", fused, method, None, build.console, None)


def measure(inputs: "ExportInputs", weights: float, positions: int) -> None:
    """Run and time every part; print the table."""
    import io

    import mlx.core as mx

    from mlx_ft.engine.load import release
    from mlx_ft.export.bit_widths import Bits
    from mlx_ft.export.build import Build, small_cache
    from mlx_ft.export.layerwise_models import layerwise_fault
    from mlx_ft.system.console import Console

    build = Build(inputs, Console(io.StringIO()), by_layers=True)
    made: dict[str, object] = {}

    def both() -> None:
        made["written"] = build.write(Bits(5))

    def compare() -> None:
        made["compared"] = build._compare(made["written"])  # type: ignore[arg-type]  # of `both`

    def audit() -> None:
        build._audit(made["written"], made["compared"])  # type: ignore[arg-type]  # of those above

    parts: dict[str, tuple[str, Callable[[], object]]] = {
        "proof": (
            "proof that layer by layer is the model",
            lambda: layerwise_fault(inputs.base, inputs.adapter, inputs.longest_row),
        ),
        "fuse": (
            "fuse, dequantize, round to float16",
            lambda: computed_parts(inputs, lambda *_: None),
        ),
        "half": ("the same, written as float16", lambda: half_folder(inputs)),
        "small": ("the same, in 5 bits, written", lambda: small_folder(inputs, build)),
        "both": ("both in one pass, as the export does it", both),
        "compare": ("eight models compared", compare),
        "audit": ("audit of the adapted layers", audit),
    }
    forecasts = works(weights, positions, 8)
    print("| part | seconds | processor time | MLX's peak | resident so far | Metal, forecast |")
    print("|---|---|---|---|---|---|")
    with small_cache():
        for key, (name, run) in parts.items():
            release()
            mx.reset_peak_memory()
            started, before = time.perf_counter(), time.process_time()
            run()
            seconds, processor = time.perf_counter() - started, time.process_time() - before
            unit = 1 if sys.platform == "darwin" else 1024
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            print(
                f"| {name} | {seconds:.0f} | {processor:.0f} | {mx.get_peak_memory() / 1e9:.2f} GB "
                f"| {resident / 1e9:.2f} GB | {forecast_seconds(forecasts[key]):.1f} s |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("bench-export"))
    parser.add_argument("--layers", type=int, default=LLAMA_3B["num_hidden_layers"])
    parser.add_argument("--prompts", type=int, default=2)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    model = work / f"model-{arguments.layers}"
    if not (model / "config.json").exists():
        write_model(model, arguments.layers)
    inputs = inputs_in(work, model, arguments.prompts)
    count = sum(file.stat().st_size for file in model.glob("*.safetensors")) * 8 / 4.5
    print(f"{count / 1e9:.2f} billion weights, load {os.getloadavg()[0]:.1f}")
    measure(inputs, count, arguments.prompts * PROMPT_TOKENS)


if __name__ == "__main__":
    main()
