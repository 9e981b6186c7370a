"""Adapters whose every tensor matters, and exports of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_ft.engine.load import load_weights
from mlx_ft.export.build import ExportInputs
from mlx_ft.export.survival.audit import Passages
from mlx_ft.recipe.schema import DataRecipe, ExportRecipe, Recipe, TrainRecipe
from mlx_ft.train.adapters import adapter_config, put_adapter, save_adapter

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_parameters": {"rank": 4, "scale": 4.0}},
    "rslora": {"lora_parameters": {"rank": 4, "alpha": 8.0, "rslora": True}},
    "embedding": {
        "lora_parameters": {
            "rank": 4,
            "scale": 4.0,
            "keys": ["self_attn.q_proj", "model.embed_tokens"],
        }
    },
    "dora": {"fine_tune_type": "dora", "lora_parameters": {"rank": 4, "scale": 4.0}},
    "full": {"fine_tune_type": "full"},
}
# name, array as training begins, noise of its shape -> array as training ended
Move = Callable[[str, mx.array, mx.array], mx.array]


def a_little(name: str, array: mx.array, noise: mx.array) -> mx.array:
    """Each tensor away from where it began, the large ones of DoRA and full training by a share."""
    return array * 1.05 if "lora" not in name else array + 0.2 * noise


def trained_adapter(base: Path, kind: str, folder: Path, move: Move = a_little) -> Path:
    """Write an adapter of a kind on the uppermost layer of a base; return its folder."""
    train = TrainRecipe.model_validate({"num_layers": 1, **KINDS[kind]})
    recipe = Recipe(name="tiny", model="tiny", data=DataRecipe(path="."), train=train)
    model, _, _ = load_weights(base)
    config = adapter_config(recipe, 1)
    put_adapter(model, train, config)
    mx.random.seed(3)
    moved = [
        (name, move(name, array, mx.random.normal(array.shape)))
        for name, array in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(moved, strict=False)
    save_adapter(model, config, folder)
    return folder


def export_inputs(
    base: Path,
    adapter: Path,
    folder: Path,
    *,
    held_out: Sequence[Sequence[int]] = PROMPTS,
    trained: Sequence[Sequence[int]] | None = None,
    prompts: Sequence[Sequence[int]] = (),
    **recipe: Any,
) -> ExportInputs:
    """Return the inputs of an export into a new folder, in groups of 32 unless `recipe` has others.

    held_out, trained, prompts: see `Passages`; held-out rows also calibrate.
    """
    names = mx.load(str(adapter / "adapters.safetensors"))
    assert isinstance(names, dict)
    folder.mkdir()
    return ExportInputs(
        name="tiny",
        base=base,
        adapter=adapter,
        folder=folder,
        adapted_modules=tuple(sorted({name.rsplit(".", 1)[0] for name in names})),
        parameters=100_000,
        recipe=ExportRecipe.model_validate({"q_group_size": 32, **recipe}),
        passages=Passages(
            held_out=held_out,
            trained=trained or [range(len(row) - 1) for row in held_out],
            prompts=prompts,
        ),
        calibration=held_out,
        card=lambda description: f"# tiny: {description}\n",
    )
