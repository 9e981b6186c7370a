"""Inputs of the preflight checks: the quickstart and variations of it."""

from dataclasses import replace
from typing import Any

from mlx_ft.preflight.checks import run_checks
from mlx_ft.preflight.findings import (
    Finding,
    PreflightInput,
)
from mlx_ft.recipe.schema import Recipe
from mlx_ft.system.hardware import Machine

SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
    "quantization": {"group_size": 32, "bits": 4},
}
QUICKSTART = {
    "name": "quickstart",
    "model": "smollm2-135m-instruct",
    "data": {"path": "data", "max_seq_length": 512},
    "train": {
        "num_layers": 8,
        "lora_parameters": {"rank": 8, "alpha": 16},
        "batch_size": 4,
        "grad_accumulation_steps": 2,
        "epochs": 2,
        "lr_schedule": {"name": "cosine_with_restarts", "warmup_ratio": 0.1, "cycles": 2},
    },
}
MACHINE = Machine("Linux", "a processor", 2, 24 * 10**9, "3.11.7")


def stats_of(rows: int = 425, **train: Any) -> dict[str, Any]:
    split = {
        "rows": rows,
        "length_quantiles": {"p5": 55, "p50": 92, "p95": 154, "max": 205},
        "longest_kept": 205,
        "stop_trained_rows": rows,
        "thinking_rows": 0,
        "toolless_rows": 0,
    }
    files = {name: [{"path": f"data/{name}.jsonl", "sha256": ""}] for name in ("train", "valid")}
    return {
        "splits": {
            "train": split | {"sources": files["train"]} | train,
            "valid": split | {"sources": files["valid"], "rows": 40},
        },
        "coverage": {"256": 1.0, "512": 1.0, "1024": 1.0, "2048": 1.0, "4096": 1.0},
        "overlap_rows": 0,
        "overlap_lines": [],
        "lint": [],
    }


def quickstart(**changes: Any) -> PreflightInput:
    facts = PreflightInput(
        recipe=Recipe.model_validate(QUICKSTART),
        data_stats=stats_of(),
        model_config=SMOLLM2_135M,
        model_bytes=90_000_000,
        machine=MACHINE,
        free_disk_bytes=50 * 10**9,
    )
    return replace(facts, **changes)


def with_recipe(facts: PreflightInput, section: str, **values: Any) -> PreflightInput:
    changed = facts.recipe.model_dump()
    changed[section] |= values
    return replace(facts, recipe=Recipe.model_validate(changed))


def finding_of(check: str, facts: PreflightInput) -> Finding:
    (found,) = [finding for finding in run_checks(facts) if finding.check == check]
    return found
