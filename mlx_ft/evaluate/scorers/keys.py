"""The keys that the target of each scorer may have.

Does: declare them, with the checks within one value. Does not: know the scorers' own keys.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from mlx_ft.recipe.fields import Section

Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Constant = str | bool | int | float
Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class SeveralTarget(Section):
    """Target of any_of and all_of: one target for each of their scorers."""

    of: list[dict[str, Any]]
