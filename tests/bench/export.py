"""The export's memory and time beside mlx-lm's way: a table for LOG.md.

A random model of Llama-3.2-3B's shape in 4 bits with a random rank-8 adapter on its top 12 layers;
ours as a whole, ours without verification, and `mlx_lm fuse --dequantize` followed by `mlx_lm
convert -q --q-bits 5`, each in a process of its own with the same BLAS. Resident memory is the
process's own peak, file pages that it maps included.

Usage: python -m tests.bench.export [--work DIR] [--only NAME] [--layers N]
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
from pathlib import Path
from typing import Any

import mlx_ft  # noqa: F401  # first: it loads OpenBLAS before mlx is imported
from tests.tiny import write_tiny_tokenizer

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
ADAPTED_LAYERS, RANK, SCALE = 12, 8, 8.0
GROUP_SIZE = 64
# Some real rows have this many tokens; random ids serve as well.
PROMPTS, PROMPT_TOKENS = 8, 96
WAYS = ("ours", "ours, GPTQ", "ours, unverified", "mlx-lm")


def write_model(folder: Path, layers: int) -> None:
    """Write the random base, a tensor at a time, and an adapter for it beside it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    from mlx_ft.export.stream import Layout, WeightsWriter

    write_tiny_tokenizer(folder)
    settings = {"group_size": GROUP_SIZE, "bits": 4}
    config = {**CONFIG, "num_hidden_layers": layers}
    model_class, arguments_class = _get_classes(config)
    model = model_class(arguments_class.from_dict(config))
    shapes = {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}
    layouts: dict[str, Layout] = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            layouts[name] = Layout(shape, mx.float16)
            continue
        groups = Layout((shape[0], shape[1] // GROUP_SIZE), mx.float16)
        layouts[name] = Layout((shape[0], shape[1] * 4 // 32), mx.uint32)
        layouts[name.replace("weight", "scales")] = layouts[name.replace("weight", "biases")] = (
            groups
        )
    mx.random.seed(0)
    with WeightsWriter(folder, layouts) as writer:
        for name, shape in shapes.items():
            if len(shape) == 1:
                ones = mx.ones(shape, mx.float16)
                mx.eval(ones)
                writer.put(name, 0, ones)
                continue
            for first in range(0, shape[0], 4096):
                rows = min(4096, shape[0] - first)
                weight = (mx.random.normal((rows, shape[1])) * 0.02).astype(mx.float16)
                packed = mx.quantize(weight, GROUP_SIZE, 4)
                mx.eval(packed)
                for leaf, array in zip(("weight", "scales", "biases"), packed, strict=True):
                    writer.put(name.replace("weight", leaf), first, array)
                mx.clear_cache()
        writer.finish()
    (folder / "config.json").write_text(json.dumps({**config, "quantization": settings}))
    write_adapter(folder / "adapter", shapes, layers)


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
    import mlx.core as mx
    import numpy as np

    from mlx_ft.console import Console
    from mlx_ft.export import stage
    from mlx_ft.export.verifying import Compared
    from mlx_ft.recipe import ExportRecipe

    generator = np.random.default_rng(0)

    def rows(count: int) -> list[list[int]]:
        return [[int(t) for t in generator.integers(3, 300, PROMPT_TOKENS)] for _ in range(count)]

    prompts = rows(PROMPTS)
    names = mx.load(str(model / "adapter" / "adapters.safetensors"))
    assert isinstance(names, dict)
    job = stage.ExportJob(
        name="bench",
        base=model,
        adapter=model / "adapter",
        folder=folder,
        adapted_modules=tuple(sorted({name.rsplit(".", 1)[0] for name in names})),
        parameters=3_213_000_000,
        recipe=ExportRecipe.model_validate({"q_method": method}),
        prompts=prompts,
        trained=[range(PROMPT_TOKENS // 2, PROMPT_TOKENS - 1) for _ in prompts],
        asked=(),
        calibration=rows(6144 // PROMPT_TOKENS) if method == "gptq" else (),
        card=lambda what: f"# bench: {what}\n",
    )
    # A random model of 28 layers is moved further by 5 bits than any real one: what is measured is
    # time and memory, and the figures are printed.
    stage.require_all = lambda checks: None
    if not verified:
        stage.layers_fault = lambda *arguments: None
        stage._compare = lambda *arguments: Compared((), None, ())
    said = io.StringIO()
    started = time.perf_counter()
    info = stage.export_model(job, Console(said))
    seconds = time.perf_counter() - started
    print(said.getvalue(), file=sys.stderr)
    return {"seconds": seconds, "mlx_peak_bytes": info["peak_memory_bytes"]}


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
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
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
        command = [sys.executable, "-m", "tests.bench.export", "--work", str(work)]
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
