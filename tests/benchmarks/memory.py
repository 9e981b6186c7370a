"""The memory that training is forecast to take, beside what it takes: a table for LOG.md.

Each line is a training of two mini-batches by `mlx-ft train` in a process of its own, on random
rows of one length. Measured is MLX's peak of active memory in that process.

Usage: python -m tests.benchmarks.memory [--work DIR] [--only NAME]
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import mlx_ft  # noqa: F401  # first: it loads OpenBLAS before mlx is imported
from mlx_ft.model.shapes import model_shape
from mlx_ft.preflight.memory import Weights, training_memory
from mlx_ft.recipe.schema import LoraParameters, TrainRecipe
from tests.benchmarks.training import write_float32_model
from tests.support.models import write_random_model

SMALL: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict[str, Any] | None] = {
    "smollm2-135m": None,  # the built-in one, its weights in float32
    "qwen3-narrow": SMALL
    | {
        "model_type": "qwen3",
        "hidden_size": 512,
        "num_hidden_layers": 16,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
    },
    "llama-wide": SMALL
    | {
        "model_type": "llama",
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 64000,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Case:
    """One training: which model, how many rows of how many tokens, and what of the recipe."""

    model: str
    tokens: int
    train: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    "8 layers": Case("smollm2-135m", 128, {"num_layers": 8}),
    "12 layers": Case("smollm2-135m", 256, {"num_layers": 12}),
    "12 layers, long": Case("smollm2-135m", 1024, {"num_layers": 12, "batch_size": 1}),
    "all layers": Case("smollm2-135m", 256, {"num_layers": -1, "batch_size": 2}),
    "all, checkpointed": Case(
        "smollm2-135m", 256, {"num_layers": -1, "batch_size": 4, "grad_checkpoint": True}
    ),
    "2,048 at once": Case(
        "smollm2-135m", 512, {"num_layers": 6, "batch_size": 4, "micro_batch_tokens": 2048}
    ),
    "rank 64": Case("smollm2-135m", 64, {"num_layers": 16, "lora_parameters": {"rank": 64}}),
    "narrow, 8 of 16": Case("qwen3-narrow", 512, {"num_layers": 8, "batch_size": 2}),
    "narrow, all": Case("qwen3-narrow", 256, {"num_layers": -1, "batch_size": 4}),
    "wide, 2 of 8": Case("llama-wide", 256, {"num_layers": 2, "batch_size": 4}),
    "wide, all": Case("llama-wide", 256, {"num_layers": -1, "batch_size": 2}),
    "wide, all, checkpointed": Case(
        "llama-wide", 512, {"num_layers": -1, "batch_size": 2, "grad_checkpoint": True}
    ),
    "narrow, low memory": Case(
        "qwen3-narrow", 256, {"num_layers": 4, "batch_size": 2, "low_memory": True}
    ),
}


def write_model(name: str, folder: Path) -> None:
    """Write a model of MODELS, random unless it is the built-in one, in float32."""
    config = MODELS[name]
    if config is None:
        write_float32_model(folder)
    else:
        write_random_model(folder, config | {"torch_dtype": "float32"})


def write_rows(folder: Path, model: Path, tokens: int) -> None:
    """Write rows of about `tokens` tokens for this model: 8 to train, 2 to validate."""
    from mlx_ft.model.chat import ChatFormat, ChatRenderer

    chat = ChatRenderer.from_folder(model, ChatFormat())

    def row(number: int, words: int) -> list[dict[str, str]]:
        answer = " ".join(str((number * 7 + word) % 10) for word in range(words))
        return [{"role": "user", "content": "Go"}, {"role": "assistant", "content": answer}]

    words = 1
    while len(chat.training_row(row(0, words + 1), mask_prompt=True).ids) <= tokens:
        words += 1
    folder.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", range(8)), ("valid", range(8, 10))):
        lines = [json.dumps({"messages": row(number, words)}) for number in numbers]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(name: str, case: Case, work: Path) -> dict[str, Any]:
    """Train one case; return what was forecast and what was measured, in bytes."""
    model = work / case.model
    if not model.exists():
        write_model(case.model, model)
    data = work / f"rows-{case.model}-{case.tokens}"
    write_rows(data, model, case.tokens)
    values = {"iters": 2, "batch_size": 4, "steps_per_eval": 2, **case.train}
    slug = "".join(c if c.isalnum() else "-" for c in name)
    file = work / f"{slug}.yaml"
    recipe = {
        "name": slug,
        "model": str(model),
        "data": {"path": str(data), "max_seq_length": 4096},
        "preflight": {"accept": dict.fromkeys(("capacity", "lint"), "nothing is to be learned")},
        "train": values,
    }
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    runs = work / f"{slug}-runs"
    subprocess.run(
        [sys.executable, "-m", "mlx_ft", "train", str(file), "--runs", str(runs)],
        check=False,  # random models fail the look; what was measured is there
        stdout=subprocess.DEVNULL,
        stderr=(work / f"{slug}.log").open("w"),
        env=os.environ | {"MLX_FT_HOME": str(work / f"{slug}-home")},
    )
    (metrics,) = runs.glob("*/train*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    measured = max(line.get("peak_memory_bytes", 0) for line in lines)
    (stats,) = runs.glob("*/data/stats.json")
    longest = json.loads(stats.read_text(encoding="utf-8"))["splits"]["train"]["longest_kept"]
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    shape = model_shape(config)
    assert shape is not None
    if "lora_parameters" in values:
        values["lora_parameters"] = LoraParameters(**values["lora_parameters"])
    train = TrainRecipe(**values)
    forecast = training_memory(shape, train, Weights(4.0), longest, train.batch_size)
    return {
        "case": name,
        "model": case.model,
        "tokens": longest,
        "frozen_bytes": forecast.frozen_layers_bytes,
        "steps_bytes": forecast.steps_bytes,
        "measured_bytes": measured,
        "error": forecast.peak_bytes / measured - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("bench-memory"))
    parser.add_argument("--only", action="append", help="a case by name; may be repeated")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    results = []
    print("| case | model | tokens | forecast MB (frozen, steps) | measured MB | error |")
    print("|---|---|---|---|---|---|")
    for name, case in CASES.items():
        if arguments.only and name not in arguments.only:
            continue
        result = measure(name, case, work)
        results.append(result)
        print(
            f"| {name} | {result['model']} | {result['tokens']:,} | "
            f"{result['frozen_bytes'] / 1e6:,.0f}, {result['steps_bytes'] / 1e6:,.0f} | "
            f"{result['measured_bytes'] / 1e6:,.0f} | {result['error']:+.0%} |",
            flush=True,
        )
    (work / "memory.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
