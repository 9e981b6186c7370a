"""The export's memory and time beside mlx-lm's way: a table for LOG.md.

A random model of Llama-3.2-3B's shape in 4 bits with a random rank-8 adapter on its top 12 layers;
ours as a whole, ours unverified (both folders are written, nothing else is done), and `mlx_lm fuse
--dequantize` followed by `mlx_lm convert -q --q-bits 5`, each in a process of its own with the same
BLAS. Resident memory is the process's own peak, file pages that it maps included.

Usage: python -m tests.benchmarks.export [--work DIR] [--only NAME] [--layers N]
"""

import argparse
import importlib
import io
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import mlx_ft  # noqa: F401  # first: it loads OpenBLAS before mlx is imported
from tests.benchmarks.shapes import LLAMA_3B, write_random_quantized

if TYPE_CHECKING:
    from mlx_ft.export.build import ExportInputs
    from mlx_ft.system.console import Console

PARAMETERS = 3_213_000_000
ADAPTED_LAYERS, RANK, SCALE = 12, 8, 8.0
# Some real rows have this many tokens; random ids serve as well.
PROMPTS, PROMPT_TOKENS = 8, 96
WAYS = ("ours", "ours, GPTQ", "ours, unverified", "mlx-lm")


def write_model(folder: Path, layers: int) -> None:
    """Write the random base, and an adapter for it beside it."""
    import mlx.core as mx

    config = LLAMA_3B | {"num_hidden_layers": layers}
    write_adapter(folder / "adapter", write_random_quantized(folder, config, mx.float16), layers)


def write_adapter(folder: Path, shapes: dict[str, tuple[int, ...]], layers: int) -> None:
    import mlx.core as mx

    first = layers - min(ADAPTED_LAYERS, layers)
    weights = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) > 1 and ".layers." in name and int(name.split(".")[2]) >= first:
            weights[f"{module}.lora_a"] = mx.random.normal((shape[1], RANK)) / shape[1] ** 0.5
            weights[f"{module}.lora_b"] = mx.random.normal((RANK, shape[0])) * 2e-4
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {
        "fine_tune_type": "lora",
        "num_layers": layers - first,
        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def ours(model: Path, folder: Path, method: str, verified: bool) -> dict[str, Any]:
    """Export in this process; return its seconds and peaks."""
    import numpy as np

    from mlx_ft.export import build
    from mlx_ft.export.stage import CALIBRATION_TOKENS
    from mlx_ft.system.console import Console
    from tests.support.exports import export_inputs

    generator = np.random.default_rng(0)

    def rows(count: int) -> list[list[int]]:
        return [[int(t) for t in generator.integers(3, 300, PROMPT_TOKENS)] for _ in range(count)]

    inputs = export_inputs(
        model,
        model / "adapter",
        folder / "ours",
        held_out=rows(PROMPTS),
        trained=[range(PROMPT_TOKENS // 2, PROMPT_TOKENS - 1)] * PROMPTS,
        q_group_size=64,
        q_method=method,
        min_survival=None,
    )
    calibration = rows(CALIBRATION_TOKENS // PROMPT_TOKENS) if method == "gptq" else ()
    inputs = replace(inputs, parameters=PARAMETERS, calibration=calibration)
    said = io.StringIO()
    started = time.perf_counter()
    if verified:
        # A random model of 28 layers is moved further by 5 bits than any real one: what is measured
        # is time and memory, and the figures are printed.
        with mock.patch("mlx_ft.export.build.require_all", lambda checks: None):
            info = build.export_model(inputs, Console(said))
    else:
        info = unverified(inputs, Console(said))
    seconds = time.perf_counter() - started
    print(said.getvalue(), file=sys.stderr)
    return {"seconds": seconds, "mlx_peak_bytes": info["peak_memory_bytes"]}


def unverified(inputs: "ExportInputs", console: "Console") -> dict[str, Any]:
    """Write both folders, as far as mlx-lm's two commands go: no proof that layer by layer is the
    model, no comparison, no audit.
    """
    import mlx.core as mx

    from mlx_ft.export import build
    from mlx_ft.export.bit_widths import Bits

    mx.reset_peak_memory()
    # The stage offers no writing without verifying, and should not: only here is that of use.
    with build.small_cache():
        build.Build(inputs, console, by_layers=True).write(Bits(inputs.recipe.most_bits))
    return {"peak_memory_bytes": int(mx.get_peak_memory())}


def theirs(model: Path, folder: Path) -> dict[str, Any]:
    """Run mlx-lm's two commands in this process, one after the other."""
    import mlx.core as mx

    fuse, convert = (importlib.import_module(f"mlx_lm.{name}") for name in ("fuse", "convert"))
    started = time.perf_counter()
    fused = folder / "fused"
    sys.argv = ["mlx_lm.fuse", "--model", str(model), "--adapter-path", str(model / "adapter")]
    sys.argv += ["--save-path", str(fused), "--dequantize"]
    fuse.main()
    mx.clear_cache()
    sys.argv = ["mlx_lm.convert", "--hf-path", str(fused), "--mlx-path", str(folder / "q5")]
    sys.argv += ["-q", "--q-bits", "5", "--q-group-size", "64"]
    convert.main()
    peak = int(mx.get_peak_memory())
    return {"seconds": time.perf_counter() - started, "mlx_peak_bytes": peak}


def measured(way: str, model: Path, folder: Path) -> dict[str, Any]:
    """Measure one way in this process."""
    if way == "mlx-lm":
        result = theirs(model, folder)
    else:
        method = "gptq" if "GPTQ" in way else "round"
        result = ours(model, folder, method, "unverified" not in way)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    seconds = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    return {**result, "resident_bytes": resident * unit, "processor_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("bench-export"))
    parser.add_argument("--only", action="append", choices=WAYS)
    parser.add_argument("--layers", type=int, default=LLAMA_3B["num_hidden_layers"])
    parser.add_argument("--in-process", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    model = work / f"model-{arguments.layers}"
    if arguments.in_process:
        folder = work / "made"
        folder.mkdir()
        print(json.dumps(measured(arguments.in_process, model, folder)))
        return
    if not (model / "config.json").exists():
        write_model(model, arguments.layers)
    print("| way | wall | processor time | resident | MLX's peak | load before |")
    print("|---|---|---|---|---|---|")
    for way in arguments.only or WAYS:
        subprocess.run(["rm", "-rf", str(work / "made")], check=True)
        load = os.getloadavg()[0]
        command = [sys.executable, "-m", "tests.benchmarks.export", "--work", str(work)]
        command += ["--layers", str(arguments.layers), "--in-process", way]
        with (work / f"{way}.log").open("w") as log:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=log, text=True, check=True
            )
        result = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {way} | {result['seconds']:.0f} s | {result['processor_seconds']:.0f} s | "
            f"{result['resident_bytes'] / 1e9:.2f} GB | "
            f"{result['mlx_peak_bytes'] / 1e9:.2f} GB | {load:.1f} |",
            flush=True,
        )
    subprocess.run(["rm", "-rf", str(work / "made")], check=True)


if __name__ == "__main__":
    main()
