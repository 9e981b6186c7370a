"""The `preflight` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mlx_ft.recipe.fields import Section, Text

# Of the checks in preflight/, those that a run can survive.
AcceptableCheck = Literal[
    "capacity",
    "family",
    "disk",
    "stop_token",
    "validation",
    "lint",
    "single_tokens",
    "base_health",
]


class PreflightRecipe(Section):
    """What the checks before training have to know."""

    family: Text | None = Field(
        None,
        description="Kind of model that these values were tuned for: the `model_type` of its "
        "config.json. A model of another kind has to be looked at with `mlx-ft probe` first.",
    )
    single_tokens: list[Text] = Field(
        default_factory=list,
        description="Texts that must be one token each for this model, such as `<tool_call>`.",
    )
    accept: dict[AcceptableCheck, Text] = Field(
        default_factory=dict,
        description="Checks that may fail, each with the reason why, which the report shows: "
        "`{capacity: 'to see it overfit'}`.",
    )
