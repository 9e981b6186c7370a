"""Recipe: the root of everything a user can set, and the one home of every default.

Does: declare the recipe's keys with their types, limits, defaults and meaning; the tables of
docs/reference.md are generated from here. Its sections are declared in `data.py`, `preflight.py`,
`train.py`, `export.py` and `evaluation.py`, and imported from here.
Does not: read files (`load.py`), translate mlx-lm's flat form (`mlx_lm.py`), or look at data,
models or the machine.
"""

from __future__ import annotations

from pydantic import Field

from mlx_ft.recipe.data import ChatRecipe, DataRecipe, LossWeight, RowFilter
from mlx_ft.recipe.evaluation import EvalRecipe
from mlx_ft.recipe.export import Q_BITS, ExportRecipe
from mlx_ft.recipe.fields import Section, Text
from mlx_ft.recipe.preflight import PreflightRecipe
from mlx_ft.recipe.train import (
    DEFAULT_EPOCHS,
    DEFAULT_SCALE,
    LoraParameters,
    LrSchedule,
    SelectRecipe,
    TrainRecipe,
)

__all__ = [
    "DEFAULT_EPOCHS",
    "DEFAULT_SCALE",
    "Q_BITS",
    "ChatRecipe",
    "DataRecipe",
    "EvalRecipe",
    "ExportRecipe",
    "LoraParameters",
    "LossWeight",
    "LrSchedule",
    "PreflightRecipe",
    "Recipe",
    "RowFilter",
    "SelectRecipe",
    "TrainRecipe",
]


class Recipe(Section):
    """One run, from data to a measured model."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$",
        description="Name of the run's folder; the file's name when left out.",
    )
    model: str = Field(
        min_length=1, description="Hub id, local MLX or Hugging Face folder, or a built-in name."
    )
    revision: Text | None = Field(
        None, description="Branch, tag or commit on the Hub; resolved to a commit and recorded."
    )
    hypothesis: Text | None = Field(
        None, description="What this run is to find out; printed beside its result."
    )
    expected: Text | None = Field(
        None, description="What is expected to come out; printed beside what did."
    )
    data: DataRecipe = Field(description="Rows to learn from.")
    chat: ChatRecipe = Field(
        default_factory=ChatRecipe, description="How conversations become tokens."
    )
    preflight: PreflightRecipe = Field(
        default_factory=PreflightRecipe,
        description="What the checks before training have to know.",
    )
    train: TrainRecipe = Field(
        default_factory=TrainRecipe, description="How the adapter is trained."
    )
    export: ExportRecipe = Field(
        default_factory=ExportRecipe, description="What is made of the adapter."
    )
    eval: EvalRecipe = Field(default_factory=EvalRecipe, description="The measurement at the end.")
