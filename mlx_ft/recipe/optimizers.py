"""Options that each optimizer accepts (`train.optimizer_config`), and their ranges.

Does not: make an optimizer or import MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_ft.recipe.fields import is_number, number_from_text

NUMBER, WHOLE, PAIR, SWITCH = "a number", "a whole number", "two numbers", "true or false"


@dataclass(frozen=True)
class _Range:
    """Allowed values of an option, in words and as a test."""

    words: str
    holds: Callable[[float], bool]


_SHARE = _Range("0 or more and less than 1", lambda value: 0 <= value < 1)
_NOT_NEGATIVE = _Range("0 or more", lambda value: value >= 0)
_NOT_BY_ITSELF = _Range(
    "false: Adafactor would take a learning rate of its own instead of train.learning_rate",
    lambda value: not value,
)
_RANGES: Mapping[str, _Range] = {
    **dict.fromkeys(("betas", "beta_1", "momentum"), _SHARE),
    **dict.fromkeys(("eps", "weight_decay", "dampening"), _NOT_NEGATIVE),
    "clip_threshold": _Range("more than 0", lambda value: value > 0),
    "ns_steps": _Range("1 or more", lambda value: value >= 1),
    **dict.fromkeys(("relative_step", "warmup_init"), _NOT_BY_ITSELF),
}
_ADAM = {"betas": PAIR, "eps": NUMBER, "bias_correction": SWITCH}
# The keyword arguments of mlx.optimizers besides the learning rate.
OPTIMIZER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "adam": _ADAM,
    "adamw": {**_ADAM, "weight_decay": NUMBER},
    "muon": {"momentum": NUMBER, "weight_decay": NUMBER, "nesterov": SWITCH, "ns_steps": WHOLE},
    "sgd": {"momentum": NUMBER, "weight_decay": NUMBER, "dampening": NUMBER, "nesterov": SWITCH},
    "adafactor": {
        "eps": PAIR,
        "clip_threshold": NUMBER,
        "decay_rate": NUMBER,
        "beta_1": NUMBER,
        "weight_decay": NUMBER,
        "scale_parameter": SWITCH,
        "relative_step": SWITCH,
        "warmup_init": SWITCH,
    },
    "lion": {"betas": PAIR, "weight_decay": NUMBER},
}


def plain_options(value: Any) -> Any:
    """Read numbers that are written as text, in a mapping of options and in lists inside it."""
    if not isinstance(value, dict):
        return value
    return {
        name: [number_from_text(item) for item in given]
        if isinstance(given, list)
        else number_from_text(given)
        for name, given in value.items()
    }


def optimizer_option_faults(optimizer: str, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (found, fix) for every option that the optimizer does not accept."""
    known = OPTIMIZER_OPTIONS[optimizer]
    faults = []
    for name, value in options.items():
        if name not in known:
            faults.append(
                (f"{optimizer} has no option {name}", f"its options are {', '.join(sorted(known))}")
            )
            continue
        fits = {
            NUMBER: is_number(value),
            WHOLE: is_number(value) and isinstance(value, int),
            PAIR: isinstance(value, list) and len(value) == 2 and all(map(is_number, value)),
            SWITCH: isinstance(value, bool),
        }
        if not fits[known[name]]:
            faults.append((f"{name} is {value!r}", f"give {known[name]}, or leave it out"))
        elif not _in_range(name, value):
            faults.append((f"{name} is {value!r}", f"give {_RANGES[name].words}"))
    plain_momentum = options.get("momentum") and not options.get("dampening")
    if optimizer == "sgd" and options.get("nesterov") is True and not plain_momentum:
        fix = "give momentum, remove dampening, or remove nesterov"
        faults.append(("nesterov needs momentum, and no dampening", fix))
    return faults


def _in_range(name: str, value: Any) -> bool:
    return name not in _RANGES or all(
        _RANGES[name].holds(each) for each in (value if isinstance(value, list) else [value])
    )
