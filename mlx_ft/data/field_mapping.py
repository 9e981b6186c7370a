"""Apply a recipe's row keys: `data.fields`, `data.keep`, weights and order.

Does not: know a row's form (`rows.py`), or read files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_ft.data.messages import Complaint
from mlx_ft.data.problems import shown
from mlx_ft.recipe.fields import is_number, number_from_text
from mlx_ft.recipe.schema import DataRecipe, RowFilter

LARGEST_WEIGHT = 1e6


@dataclass(frozen=True)
class RowKeys:
    """The keys that a recipe names.

    parts: name of a part in a form -> the rows' own key.
    """

    parts: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[RowFilter, ...] = ()
    weight: str | None = None
    order: str | None = None

    @classmethod
    def of(cls, data: DataRecipe) -> RowKeys:
        """Return those of a recipe."""
        return cls(dict(data.fields.items()), tuple(data.keep), data.weight_field, data.order_field)


NO_KEYS = RowKeys()


def renamed(value: Mapping[str, Any], keys: RowKeys) -> Mapping[str, Any]:
    """Return a row with its parts under the names that the forms have for them.

    A value that stood under such a name before is not that part, and is dropped.
    """
    if not keys.parts:
        return value
    kept = {k: v for k, v in value.items() if k not in keys.parts}
    return kept | {part: value[own] for part, own in keys.parts.items() if own in value}


def refusal(value: Any, keys: RowKeys) -> tuple[list[Complaint], str | None]:
    """Return complaints about the keys that rows are chosen by, and a reason.

    The reason says why the row is left out; None means that it is used.
    """
    if not isinstance(value, dict):
        return [], None
    complaints = []
    for rule in keys.keep:
        complaint, reason = _asked(value, rule)
        if reason is not None:
            return [], reason
        complaints += [complaint] if complaint is not None else []
    return complaints, None


def _asked(value: Mapping[str, Any], rule: RowFilter) -> tuple[Complaint | None, str | None]:
    name = rule.field
    if name not in value:
        fix = "write it in every row, or change data.keep"
        return Complaint("no key to filter by", f"has no {name}", fix), None
    given = value[name]
    if rule.one_of is not None and not (isinstance(given, str) and given in rule.one_of):
        return None, f"whose {name} is none of {', '.join(rule.one_of)}"
    if rule.at_least is None and rule.at_most is None:
        return None, None
    number = number_from_text(given)
    if not is_number(number):
        found = f"{name} is {shown(given)}, not a number"
        return Complaint("filter not a number", found, "write a number, or change data.keep"), None
    if rule.at_least is not None and number < rule.at_least:
        return None, f"whose {name} is below {rule.at_least:g}"
    if rule.at_most is not None and number > rule.at_most:
        return None, f"whose {name} is above {rule.at_most:g}"
    return None, None


def weight_and_order(
    value: Mapping[str, Any], keys: RowKeys
) -> tuple[float, float | str | None, list[Complaint]]:
    """Return a row's weight (1 without one), its sort key (None without an order), and complaints
    about both.
    """
    complaints = []
    # A CSV file has texts only.
    weight = 1 if keys.weight is None else number_from_text(value.get(keys.weight, 1))
    if not is_number(weight) or not 0 <= weight < LARGEST_WEIGHT:
        found = f"{keys.weight} is {shown(weight)}, not a weight"
        complaints.append(Complaint("weight not a number", found, "write a number from 0 on"))
        weight = 1
    order = None
    if keys.order is not None:
        order = number_from_text(value.get(keys.order))
        if not is_number(order) and not isinstance(order, str):
            found = f"{keys.order} is {shown(order)}, which orders nothing"
            if keys.order not in value:
                found = f"has no {keys.order} to be ordered by"
            complaints.append(Complaint("no order", found, "write a number or a text"))
            order = None
    return float(weight), order, complaints
