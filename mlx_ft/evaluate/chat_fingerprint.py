"""Compare a model's chat format with that of its training and of the suites.

Does: name each difference, and warn where a comparison was impossible or a mismatch was allowed.
Does not: make fingerprints (`model/chat.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_ft.errors import Fault, ModelError
from mlx_ft.evaluate.column import Column
from mlx_ft.evaluate.suites import Suite

MAX_SHOWN_CHARACTERS = 60
_ABSENT = object()


@dataclass(frozen=True)
class TemplateCheck:
    """The result of comparing a column's chat format with its training's.

    state: "same" as trained; "own", no training of it is known; "unknown", a server's; "mismatch",
        which was allowed.
    warnings: lines for the results.
    """

    state: Literal["same", "own", "unknown", "mismatch"]
    warnings: tuple[str, ...] = ()


def compare_template(column: Column, *, allow_mismatch: bool) -> TemplateCheck:
    """Compare a column's chat format with the one it was trained with.

    Raises ModelError when they differ, unless that is allowed: then each difference is a warning.
    """
    if column.renderer is None:
        return TemplateCheck(
            "unknown",
            (
                f"{column.name}: the server renders prompts by itself; its chat template, thinking "
                "mode and date could not be compared with any training",
            ),
        )
    if column.trained_with is None:
        return TemplateCheck("own")
    try:
        check_fingerprint(column.trained_with, column.renderer.fingerprint())
    except ModelError as error:
        if not allow_mismatch:
            raise ModelError(
                [
                    Fault(f"{column.name}, {each.where}", each.found, each.fix)
                    for each in error.faults
                ]
            ) from error
        told = [f"{column.name}: {each.where}: {each.found}" for each in error.faults]
        intro = f"{column.name}: MEASURED WITH ANOTHER CHAT FORMAT than it was trained with"
        return TemplateCheck("mismatch", (intro, *told))
    return TemplateCheck("same")


def thinking_faults(suites: Sequence[Suite], enable_thinking: bool) -> list[Fault]:
    """Return a fault for every suite that asks in another thinking mode than this one."""

    def word(mode: bool) -> str:
        return str(mode).lower()

    return [
        Fault(
            f"suite {suite.name}",
            f"its enable_thinking is {word(suite.enable_thinking)}, but the model was trained and "
            f"is asked with {word(enable_thinking)}",
            "make it equal to the recipe's `chat.enable_thinking`",
        )
        for suite in suites
        if suite.enable_thinking != enable_thinking
    ]


def check_fingerprint(trained: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise ModelError with one fault for each part in which two fingerprints differ.

    trained: the fingerprint (`ChatRenderer.fingerprint`) that is stored with the training data.
    current: that of the model at hand.
    """
    fix = "use the tokenizer, chat template and `chat` settings of the training, or train again"
    faults = [
        Fault(f"chat fingerprint, {part}", f"trained with {_shown(old)}, now {_shown(new)}", fix)
        for part, old, new in _differences(trained, current, "")
    ]
    if faults:
        raise ModelError(faults)


def _differences(trained: Any, current: Any, part: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(trained, Mapping) and isinstance(current, Mapping):
        for key in sorted(trained.keys() | current.keys()):
            name = f"{part}.{key}" if part else str(key)
            yield from _differences(trained.get(key, _ABSENT), current.get(key, _ABSENT), name)
    elif _is_list(trained) and _is_list(current) and len(trained) == len(current):
        for index, (old, new) in enumerate(zip(trained, current, strict=True)):
            if _is_list(old) or isinstance(old, Mapping):
                yield from _differences(old, new, f"{part}[{index}]")
            elif old != new:
                yield f"{part}[{index}]", old, new
                return  # where a list of ids begins to differ says it all
    elif trained != current:
        yield part, trained, current


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."
