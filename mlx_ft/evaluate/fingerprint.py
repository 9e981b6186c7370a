"""Is the chat format of this model the one that was trained with? Does not make fingerprints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_ft.errors import Fault, ModelError

MAX_SHOWN_CHARACTERS = 60
_ABSENT = object()


def check_fingerprint(trained: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise ModelError with one fault for each part in which two fingerprints differ.

    Fingerprints are what `ChatRenderer.fingerprint` returns: `trained` as stored with the training
    data, `current` of the model at hand.
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
