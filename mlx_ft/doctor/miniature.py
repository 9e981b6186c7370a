"""A small random model, the rows that it trains on, and one step of that training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.llama import Model, ModelArgs

from mlx_ft.data.tokens import TokenizedSplit, pack_rows
from mlx_ft.engine.device import on_cpu
from mlx_ft.engine.load import hold_for_cpu
from mlx_ft.recipe.schema import LoraParameters, TrainRecipe
from mlx_ft.train.accumulation import GradientWindow, StepForm, build_optimizer
from mlx_ft.train.adapters import put_adapter
from mlx_ft.train.numerics.batch import Batch, make_batch
from mlx_ft.train.numerics.forward import Forward
from mlx_ft.train.numerics.losses import cross_entropy_sum

WORDS, BITS, GROUP_SIZE = 4096, 4, 64
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": WORDS,
    "tie_word_embeddings": True,
}
LORA = {"rank": 8, "scale": 2.0, "dropout": 0.0}


def miniature() -> nn.Module:
    """Return the model without an adapter: 4 bits and bfloat16, or what a CPU holds of that."""
    mx.random.seed(0)
    model: nn.Module = Model(ModelArgs.from_dict(CONFIG))
    model.update(tree_map(lambda a: a.astype(mx.bfloat16), model.parameters()))
    nn.quantize(model, GROUP_SIZE, BITS)
    mx.eval(model.parameters())
    return hold_for_cpu(model) if on_cpu() else model


def adapt(model: nn.Module, layers: int) -> TrainRecipe:
    """Put an adapter on the top layers, its second matrices not zero; return its settings."""
    lora = LoraParameters(rank=8, scale=2.0)
    recipe = TrainRecipe(num_layers=layers, lora_parameters=lora, iters=1, learning_rate=1e-3)
    config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": LORA}
    put_adapter(model, recipe, config)
    mx.random.seed(1)
    drawn = [
        (name, mx.random.normal(array.shape) * 0.02)
        for name, array in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(drawn, strict=False)
    model.train()
    mx.eval(model.parameters())
    return recipe


def rows_of(lengths: Sequence[int]) -> TokenizedSplit:
    """Return rows of so many predictions, of which the last half is trained."""
    generator = np.random.default_rng(0)
    rows = []
    for length in lengths:
        trained = np.zeros(length + 1, np.uint8)
        trained[length // 2 :] = 1
        rows.append((generator.integers(3, WORDS, length + 1).astype(np.int32), trained))
    return pack_rows(rows, list(range(1, len(rows) + 1)))


@dataclass(frozen=True, eq=False)
class Step:
    """One training step: the model, its window of gradients, a batch, and the batch's prefix."""

    model: nn.Module
    window: GradientWindow
    optimizer: optimizers.Optimizer
    batch: Batch
    prefix: mx.array

    @staticmethod
    def of(
        model: nn.Module,
        recipe: TrainRecipe,
        forward: Forward,
        lengths: Sequence[int],
        state: Any = None,
    ) -> Step:
        """Return the step on rows of these lengths; `state` is an earlier optimizer's."""
        rows = rows_of(lengths)
        batch = make_batch(rows, tuple(range(len(rows))), 0 if forward.packs else None)
        optimizer = build_optimizer(recipe)
        optimizer.init(model.trainable_parameters())
        if state is not None:
            optimizer.state = state

        def loss(batch: Batch, prefix: mx.array) -> mx.array:
            return cross_entropy_sum(forward, batch, prefix)

        form = StepForm.of(recipe, forward)
        window = GradientWindow(model, loss, optimizer, 1.0, form)
        prefix = forward.prefix(batch.ids)
        forward.evaluate(prefix)
        return Step(model, window, optimizer, batch, prefix)

    def take(self) -> float:
        """Train the step once and return its loss (nats a trained token)."""
        self.window.add(self.batch, self.prefix)
        return self.window.update(1e-3).loss
