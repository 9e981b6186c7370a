"""Tiny real models with adapters and tokenized rows, for the training room's tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_ft.data.tokens import TokenizedSplit
from mlx_ft.engine.load import load_weights
from mlx_ft.recipe.schema import DataRecipe, LoraParameters, Recipe, TrainRecipe
from mlx_ft.train.adapters import adapter_config, put_adapter
from mlx_ft.train.contract import TrainingInputs
from mlx_ft.train.numerics.forward import choose_forward
from tests.support.models import write_tiny_model
from tests.support.slow import fast_first
from tests.support.trainings import random_rows

MakeInputs = Callable[..., TrainingInputs]


@pytest.fixture(scope="session", params=fast_first(["llama", "qwen3"]))
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"tiny-{request.param}")
    return write_tiny_model(folder, request.param, layers=3)


@pytest.fixture
def make_inputs(model_folder: Path, tmp_path: Path) -> MakeInputs:
    """Build inputs with a fresh model; keyword arguments change the train recipe."""

    def make(
        rows: TokenizedSplit | None = None,
        folder: str = "train",
        iterations: int = 12,
        num_layers: int = 2,
        dropout: float = 0.0,
        prefix_folder: Path | None = None,
        validation_rows: TokenizedSplit | None = None,
        **changes: object,
    ) -> TrainingInputs:
        rows = random_rows(13, seed=1) if rows is None else rows
        values = {
            "learning_rate": 1e-2,
            "steps_per_report": 3,
            "steps_per_eval": 6,
            "save_every": 4,
        }
        train = TrainRecipe.model_validate(
            {
                "num_layers": num_layers,
                "lora_parameters": LoraParameters(rank=4, alpha=8.0, dropout=dropout),
                **values,
                **changes,
            }
        )
        recipe = Recipe(name="tiny", model="tiny", data=DataRecipe(path="."), train=train)
        model, _, _ = load_weights(model_folder, train.low_memory)
        config = adapter_config(recipe, num_layers)
        shape = put_adapter(model, train, config)
        model.eval()
        proof = [rows.row(index)[0].tolist() for index in range(min(2, len(rows)))]
        target = tmp_path / folder
        target.mkdir(exist_ok=True)
        return TrainingInputs(
            model=model,
            forward=choose_forward(
                model, num_layers, proof, weights=model_folder if train.low_memory else None
            ),
            shape=shape,
            adapter_config=config,
            train_rows=rows,
            validation_rows=validation_rows or random_rows(5, seed=2),
            recipe=train,
            iterations=iterations,
            folder=target,
            inputs_hash="inputs",
            prefix_limit_bytes=0 if train.prefix_cache == "off" else 1 << 20,
            prefix_folder=prefix_folder,
            computed_by="tiny",
            model_folder=model_folder,
        )

    return make
