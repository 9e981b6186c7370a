"""Keys of a scorer: what every scorer's keys must offer, and the types that several share.

Does: declare them. Does not: know any scorer.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, StringConstraints

from mlx_ft.evaluate.scorers.protocol import Scorer
from mlx_ft.recipe.fields import Section

Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Constant = str | bool | int | float
Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ScorerKeys(Section):
    """Keys of one scorer in a suite.

    name: the scorer's name in the list of `registry.py`; a subclass allows only its own
    target: the class that reads a sample's target for this scorer
    """

    name: str
    target: ClassVar[type[Section]]

    def build(self) -> Scorer:
        """Return the scorer that these keys describe."""
        raise NotImplementedError

    def target_fault(self, target: Any) -> str | None:
        """Return why a target does not fit these keys, or None.

        `target` is an instance of the class `target`: its own keys have been checked.
        """
        return None
