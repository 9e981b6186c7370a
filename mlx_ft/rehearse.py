"""Rehearse the whole pipeline in minutes: a small recipe, optionally a tiny random model.

Does: check the recipe as it is, then run every stage with a few rows and two updates.
Does not: say anything about memory, speed or quality of the real model.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault, ModelError
from mlx_ft.inputs import OpenRun
from mlx_ft.model.resolve import ResolvedModel
from mlx_ft.pipeline import PREFLIGHT, STAGES, run_pipeline
from mlx_ft.recipe.schema import Recipe

# A rehearsal's few rows would fail checks that the recipe's own rows have passed before it.
REHEARSED = tuple(stage for stage in STAGES if stage.has_folder)
SUFFIX = "-rehearsal"
LEAST_ROWS = 8
UPDATES = 2
PROMPTS_PER_SUITE = 2
LAYERS = 2
# Small, and divisible by every group size of a quantization. Keys as in the configs of mlx-lm.
NARROW: Mapping[str, int] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
}
# One entry a layer, or a list of layers.
PER_LAYER = ("layer_types", "no_rope_layers", "mlp_only_layers")


def rehearse(open_with: Callable[[tuple[str, ...]], OpenRun], miniature: bool) -> float:
    """Check a recipe, run every stage of it made small, and return the seconds it took.

    open_with: opens the recipe with settings added to it.
    miniature: the model is made small as well.

    The made-small run is removed, unless a stage raises: its run folder then stays.
    """
    opened = open_with(())
    run_pipeline(opened, PREFLIGHT)
    checked = opened.job
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mlx-ft-miniature-") as folder:
        small = rehearsal_sets(checked.recipe)
        if miniature:
            checked.console.heading(
                f"Miniature: two random layers like those of {checked.model.name}"
            )
            write_miniature(checked.model, Path(folder) / "model")
            layers = int(checked.model.config.get("num_hidden_layers", 0))
            small = (*small, *miniature_sets(checked.recipe, layers, Path(folder) / "model"))
        run = open_with(small)
        job = replace(run.job, judged=not miniature)
        run_pipeline(replace(run, job=job), stages=REHEARSED)
        shutil.rmtree(job.folder)
    return time.perf_counter() - started


def rehearsal_sets(recipe: Recipe) -> tuple[str, ...]:
    """Return the `KEY=VALUE` settings that make a rehearsal of a recipe.

    Two optimizer updates on a few rows, with a report, a validation and a checkpoint after each.
    Two prompts a suite, which no gate judges.
    Model, adapter, batch, lengths and export stay as they are, so that their failures show now.
    Survival is not checked and chooses no bits: two updates teach nothing that could survive.
    """
    train = recipe.train
    window = train.grad_accumulation_steps
    values = {
        "name": f"{recipe.name[: 80 - len(SUFFIX)]}{SUFFIX}",
        "data.limit": max(LEAST_ROWS, train.batch_size),
        "train.epochs": "null",
        "train.iters": UPDATES * window,
        "train.steps_per_report": window,
        "train.steps_per_eval": window,
        "train.save_every": window,
        "train.lr_schedule.allow_unfinished": "true",
        "train.report_to": "[]",
        "eval.limit": PROMPTS_PER_SUITE,
        "eval.gates": "{}",
        "export.min_survival": "null",
        "export.q_bits": recipe.export.most_bits,
    }
    if train.select.by is not None:
        values |= {"train.select.every": window, "train.select.limit": PROMPTS_PER_SUITE}
    if train.seeds:
        values |= {"train.seeds": "[]", "train.seed": train.seeds[0]}
    return tuple(f"{key}={value}" for key, value in values.items())


def miniature_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's config with two narrow layers; its vocabulary and all else stay."""
    small: dict[str, Any] = {
        key: min(value, NARROW[key]) if key in NARROW and isinstance(value, int) else value
        for key, value in config.items()
    }
    for key in PER_LAYER:
        if isinstance(small.get(key), list):
            small[key] = [] if key == "mlp_only_layers" else small[key][:LAYERS]
    heads = config.get("num_key_value_heads")
    if heads is not None and heads == config.get("num_attention_heads"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    if isinstance(small.get("text_config"), Mapping):
        small["text_config"] = miniature_config(small["text_config"])
    return small


def write_miniature(model: ResolvedModel, folder: Path) -> None:
    """Write the miniature of a model as a model folder, quantized as the model is.

    Raises ModelError when mlx-lm does not have the architecture, or not in this size.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.utils import _get_classes

    from mlx_ft.export.model_folder import write_model_folder

    config = miniature_config(model.config)
    try:
        model_class, arguments_class = _get_classes(config)
        mx.random.seed(0)
        small = model_class(arguments_class.from_dict(config))
        small(mx.array([[0, 1]]))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        found = f"no miniature of a {model.model_type} model can be made ({error})"
        raise ModelError(Fault(model.name, found, "rehearse without --miniature")) from error
    quantization = config.get("quantization")
    if isinstance(quantization, Mapping):
        bits, group_size = quantization.get("bits", 4), quantization.get("group_size", 64)
        nn.quantize(small, group_size=group_size, bits=bits)
        config["quantization"] = {"group_size": group_size, "bits": bits}
        config.pop("quantization_config", None)
    write_model_folder(folder, model.path, small, config, f"# Miniature of {model.name}\n")


def miniature_sets(recipe: Recipe, layers: int, folder: Path) -> tuple[str, ...]:
    """Return the `KEY=VALUE` settings that put the miniature in the place of a recipe's model.

    layers: of that model. Frozen layers stay if there were some.
    """
    wanted = recipe.train.num_layers
    frozen = 0 < wanted < layers
    return (
        f"model={folder}",
        "revision=null",
        f"train.num_layers={1 if frozen else -1}",
        "train.resume_adapter_file=null",
    )
