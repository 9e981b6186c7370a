"""The keys of mlx-lm's flat LoRA configuration: their meaning, and which are refused.

Taken from mlx-lm 0.32 (`mlx_lm/lora.py`, CONFIG_DEFAULTS). Does not: read values.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from mlx_ft.recipe.keys import SYNONYMS, squeezed

MLX_LM_DEFAULT = "mlx-lm default"

# Flat keys that a recipe has too, with mlx-lm's default. None: mlx-lm has a default that is not
# taken over (a data set on the Hub).
SAME_MEANING: Mapping[str, tuple[str, Any]] = {
    "model": ("model", "Qwen/Qwen3-0.6b"),
    "data": ("data.path", None),
    "max_seq_length": ("data.max_seq_length", 2048),
    "mask_prompt": ("data.mask_prompt", False),
    "num_layers": ("train.num_layers", 16),
    "batch_size": ("train.batch_size", 4),
    "grad_accumulation_steps": ("train.grad_accumulation_steps", 1),
    "iters": ("train.iters", 1000),
    "learning_rate": ("train.learning_rate", 1e-5),
    "fine_tune_type": ("train.fine_tune_type", "lora"),
    "grad_checkpoint": ("train.grad_checkpoint", False),
    "optimizer": ("train.optimizer", "adam"),
    "steps_per_report": ("train.steps_per_report", 10),
    "steps_per_eval": ("train.steps_per_eval", 200),
    "save_every": ("train.save_every", 100),
    "val_batches": ("train.val_batches", 25),
    "seed": ("train.seed", 0),
    "resume_adapter_file": ("train.resume_adapter_file", None),
    "project_name": ("train.project_name", None),
}
LORA_DEFAULTS: Mapping[str, Any] = {"rank": 8, "scale": 20.0, "dropout": 0.0}
LORA_KEYS = ("rank", "scale", "alpha", "dropout", "keys")
DEFAULT_ADAPTER_PATH = "adapters"
# What has nothing to act on here, with the reason.
NO_EFFECT: Mapping[str, str] = {
    "config": "names a configuration file inside one; no effect",
    "clear_cache_threshold": "no effect, memory is managed by the run",
    "test_batches": "no effect without test: true",
}
# What can only have some values: the accepted ones, and why the others are refused.
RESTRICTED: Mapping[str, tuple[tuple[Any, ...], str, str]] = {
    "training_mode": (
        ("normal", "sft"),
        "trains on preferences, which is not offered yet",
        "use training_mode: normal with rows that show the wanted answer",
    ),
    "test": (
        (False,),
        "asks for the loss on test.jsonl, which is not measured",
        "set it to false; a recipe's eval.suites measure the finished model",
    ),
    "trust_remote_code": (
        (False,),
        "would run code that comes with a model",
        "set it to false and use a model that needs none",
    ),
}
# Names of a row's parts, by the flat keys that say them.
FEATURES: Mapping[str, str] = {
    "prompt_feature": "prompt",
    "completion_feature": "completion",
    "text_feature": "text",
    "chat_feature": "messages",
}
# What mlx-lm takes of a dataset's train split when nothing else is said.
HUB_SPLITS: Mapping[str, str] = {"train_split": "train[:80%]", "valid_split": "train[-10%:]"}
HUB_KEYS = ("path", "config", *HUB_SPLITS, "test_split", "mask_prompt", *FEATURES)
OTHERS = (
    "train",
    "adapter_path",
    "lora_parameters",
    "lr_schedule",
    "optimizer_config",
    "report_to",
    "hf_dataset",
)
FLAT_KEYS = frozenset({*SAME_MEANING, *NO_EFFECT, *RESTRICTED, *OTHERS, *FEATURES})
RECIPE_SECTIONS = ("data", "chat", "preflight", "train", "export", "eval")
SCHEDULES = {"cosine_decay": "cosine", "linear_schedule": "linear"}


def is_mlx_lm_form(values: Mapping[str, Any]) -> bool:
    """Return whether a mapping is mlx-lm's flat form: its keys, and no section of a recipe."""
    if any(isinstance(values.get(name), Mapping) for name in RECIPE_SECTIONS):
        return False
    own = FLAT_KEYS - {"model", "data", "train"}
    return isinstance(values.get("train"), bool) or bool(own & set(values))


def near_flat_keys(name: str) -> list[str]:
    """Return flat keys that `name` may stand for."""
    wanted = squeezed(name)
    by_squeezed = {squeezed(key): key for key in FLAT_KEYS}
    if wanted in by_squeezed:
        return [by_squeezed[wanted]]
    from_recipe = {recipe: flat for flat, (recipe, _) in SAME_MEANING.items()}
    meant = SYNONYMS.get(wanted, "")
    if meant in from_recipe:
        return [from_recipe[meant]]
    if meant.startswith(("train.lora_parameters", "train.lr_schedule", "train.optimizer_config")):
        return [meant.removeprefix("train.")]
    near = difflib.get_close_matches(wanted, by_squeezed, n=1, cutoff=0.75)
    return [by_squeezed[each] for each in near]
