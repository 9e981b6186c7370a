"""The memory that a GPU's training is forecast to take, beside what it takes: a table.

Each line is a training of two mini-batches in a process of its own, on random rows, in a GPU's way
(MLX_FT_AS_GPU=1) on whatever device MLX has. On a CPU, norms and attention are made to keep what
Metal's keep. Measured is MLX's peak of active memory. Nothing here was measured on Metal.

Usage: python -m tests.benchmarks.gpu_memory [--work DIR] [--only NAME]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx_ft  # noqa: F401  # first: it loads OpenBLAS before mlx is imported
from mlx_ft.engine.device import AS_GPU
from mlx_ft.model.shapes import model_shape
from mlx_ft.preflight.memory import Weights, training_memory
from mlx_ft.recipe.schema import DataRecipe, LoraParameters, Recipe, TrainRecipe

COMMON: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "vocab_size": 16000,
    "head_dim": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": COMMON
    | {
        "model_type": "llama",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "intermediate_size": 1024,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen3": COMMON
    | {
        "model_type": "qwen3",
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "intermediate_size": 1536,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
# Name -> type of weights and activations, bits of quantized weights.
TYPES = {
    "bfloat16": ("bfloat16", None),
    "float16": ("float16", None),
    "4-bit": ("bfloat16", 4),
    "5-bit": ("bfloat16", 5),
    "8-bit": ("float16", 8),
}


@dataclass(frozen=True)
class Case:
    """One training: which model in which type, rows of how many tokens, and what of the recipe."""

    model: str
    base: str
    tokens: int
    train: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    "8 of 12 layers": Case("llama", "bfloat16", 128, {"num_layers": 8}),
    "the same, float16": Case("llama", "float16", 128, {"num_layers": 8}),
    "the same, 4 bits": Case("llama", "4-bit", 128, {"num_layers": 8}),
    "the same, 5 bits": Case("llama", "5-bit", 128, {"num_layers": 8}),
    "4 layers, 8 bits": Case("llama", "8-bit", 64, {"num_layers": 4}),
    "long rows": Case("llama", "float16", 640, {"num_layers": 4, "batch_size": 1}),
    "1,024 at once": Case(
        "llama", "bfloat16", 256, {"num_layers": 4, "batch_size": 4, "micro_batch_tokens": 1024}
    ),
    "micro-batches": Case(
        "llama", "bfloat16", 128, {"num_layers": 8, "batch_size": 8, "micro_batch_tokens": 256}
    ),
    "checkpointed": Case("llama", "float16", 256, {"num_layers": -1, "grad_checkpoint": True}),
    "low memory": Case("llama", "bfloat16", 256, {"num_layers": 6, "low_memory": True}),
    "rank 64": Case("llama", "bfloat16", 64, {"num_layers": 8, "lora_parameters": {"rank": 64}}),
    "wide heads": Case("qwen3", "float16", 128, {"num_layers": 6}),
    "wide heads, bfloat16": Case("qwen3", "bfloat16", 256, {"num_layers": 4, "batch_size": 2}),
}


def recipe_of(case: Case) -> TrainRecipe:
    values = {"batch_size": 4, "iters": 2, "steps_per_eval": 2, "learning_rate": 1e-4, **case.train}
    if "lora_parameters" in values:
        values["lora_parameters"] = LoraParameters(**values["lora_parameters"])
    return TrainRecipe(**values)


def write_model(case: Case, folder: Path) -> None:
    import mlx.core as mx

    from tests.support.models import write_stored_model

    dtype, bits = TYPES[case.base]
    config = MODELS[case.model] | {"torch_dtype": dtype}
    write_stored_model(folder, config, getattr(mx, dtype), bits)


def train(case: Case, work: Path) -> None:
    """Train a case in this process and print the peak of memory in bytes."""
    import io

    import mlx.core as mx
    import numpy as np

    from mlx_ft.data.tokens import pack_rows, write_split
    from mlx_ft.system.console import Console
    from mlx_ft.train.handoff import TrainRequest
    from mlx_ft.train.session import train_with_progress
    from mlx_ft.train.setup import Setup
    from tests.support.gpu_memory import kept_as_on_metal

    target = work / f"train-{time.time_ns()}"
    data = target / "data"
    data.mkdir(parents=True)
    generator = np.random.default_rng(0)
    trained = np.zeros(case.tokens + 1, np.uint8)
    trained[case.tokens // 2 :] = 1
    for name, count in (("train", 8), ("valid", 2)):
        ids = generator.integers(3, 300, (count, case.tokens + 1)).astype(np.int32)
        rows = pack_rows([(row, trained) for row in ids], list(range(1, count + 1)))
        write_split(data / f"{name}.safetensors", rows)
    recipe = Recipe(name="memory", model="random", data=DataRecipe(path="."), train=recipe_of(case))
    folder = work / f"{case.model}-{case.base}"
    request = TrainRequest(recipe, folder, data, target, "i", "random", 1 << 30, target, ())
    mx.clear_cache()
    mx.reset_peak_memory()
    with kept_as_on_metal():
        inputs = Setup(request).inputs(request)
        print(inputs.forward.note, file=sys.stderr)
        proofs = mx.get_peak_memory()
        train_with_progress(inputs, Console(io.StringIO()))
    print(json.dumps({"proofs_bytes": proofs, "measured_bytes": mx.get_peak_memory()}))


def measure(name: str, case: Case, work: Path) -> dict[str, Any]:
    """Train one case in a process; return what was forecast and what was measured, in bytes."""
    folder = work / f"{case.model}-{case.base}"
    if not folder.exists():
        write_model(case, folder)
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.gpu_memory", "--work", str(work), "--child", name],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {AS_GPU: "1"},
    )
    found = json.loads(done.stdout)
    shape = model_shape(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    assert shape is not None
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / shape.parameters
    recipe = recipe_of(case)
    forecast = training_memory(
        shape, recipe, Weights(stored, 2), case.tokens, recipe.batch_size, trained_share=0.5
    )
    return {
        "case": name,
        "base": f"{case.model}, {case.base}",
        "tokens": case.tokens,
        "frozen_bytes": forecast.frozen_layers_bytes,
        "steps_bytes": forecast.steps_bytes,
        **found,
        "error": forecast.peak_bytes / max(found["measured_bytes"], found["proofs_bytes"]) - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("bench-gpu-memory"))
    parser.add_argument("--only", action="append", help="a case by name; may be repeated")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if arguments.child is not None:
        train(CASES[arguments.child], work)
        return
    results = []
    print("| case | base | tokens | forecast MB (frozen, steps) | measured MB | error |")
    print("|---|---|---|---|---|---|")
    for name, case in CASES.items():
        if arguments.only and name not in arguments.only:
            continue
        result = measure(name, case, work)
        results.append(result)
        print(
            f"| {name} | {result['base']} | {result['tokens']:,} | "
            f"{result['frozen_bytes'] / 1e6:,.1f}, {result['steps_bytes'] / 1e6:,.1f} | "
            f"{max(result['measured_bytes'], result['proofs_bytes']) / 1e6:,.1f} | "
            f"{result['error']:+.0%} |",
            flush=True,
        )
    (work / "gpu-memory.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
