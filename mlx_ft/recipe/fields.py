"""Field types of a recipe (numbers, texts, sections), and conflicts between fields.

Does not: know any key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)

LARGEST_WHOLE = 2**31 - 1
NUMBER_TEXT = re.compile(r"[-+]?((0|[1-9][0-9]*(_[0-9]+)*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


def number_from_text(value: Any) -> Any:
    """Return the number in a text such as `1e-5`. Other values are returned unchanged."""
    if not isinstance(value, str) or not NUMBER_TEXT.fullmatch(value):
        return value
    try:
        return int(value)
    except ValueError:
        return float(value)


def is_number(value: Any) -> bool:
    """Return whether a value is a number to compute with: no switch, not NaN, not beyond 1e300."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def whole_from_text(value: Any) -> Any:
    """Return 1000 for `1e3`, as text or float. Other values are returned unchanged."""
    value = number_from_text(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Real = Annotated[float, BeforeValidator(number_from_text)]
Whole = Annotated[int, Field(le=LARGEST_WHOLE), BeforeValidator(whole_from_text)]
Text = Annotated[str, Field(min_length=1)]


def _day_of_the_calendar(value: str) -> str:
    date.fromisoformat(value)
    return value


Day = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$"), AfterValidator(_day_of_the_calendar)]


@dataclass(frozen=True)
class Conflict:
    """Values that are right each by itself but not together: dotted `keys`, `found`, `fix`.

    `item` is the one of a mapping's entries that is meant, where the key holds a mapping.
    """

    keys: tuple[str, ...]
    found: str
    fix: str
    item: str | None = None


class Section(BaseModel):
    """Rules of every section: no unknown keys, no guessed conversions, immutable.

    Conflicts between keys raise ValueError. If the validation context has a list under "conflicts",
    they are appended to it instead, so that a reader of files can report them beside other faults.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def conflicts(self) -> list[Conflict]:
        """Return the conflicts between this section's values."""
        return []

    @model_validator(mode="after")
    def _without_conflicts(self, info: ValidationInfo) -> Section:
        found = self.conflicts()
        if isinstance(info.context, dict) and "conflicts" in info.context:
            info.context["conflicts"].extend(found)
        elif found:
            raise ValueError("; ".join(f"{each.found} - {each.fix}" for each in found))
        return self


def optimizer_updates(iters: int, grad_accumulation_steps: int) -> int:
    """Return the number of optimizer updates in `iters` mini-batches. A partial one counts."""
    return -(-iters // grad_accumulation_steps)
