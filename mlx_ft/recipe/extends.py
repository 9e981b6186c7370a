"""`extends: parent.yaml`: recipes that change a few values of another one.

Does: read the parents, lay the recipe's values over theirs, and keep where each was written. A
section is merged key by key; any other value replaces the parent's whole.
Does not: judge values, or apply `--set` (`load.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault
from mlx_ft.recipe.keys import KeyPath, dotted, section_of
from mlx_ft.recipe.mlx_lm_keys import is_mlx_lm_form
from mlx_ft.recipe.strict_yaml import Source, label_of, read_mapping, read_text, shown
from mlx_ft.text.suggestions import suggestion

EXTENDS = "extends"
MOST_PARENTS = 8
# What belongs to one recipe alone.
NOT_INHERITED = ("name", "hypothesis", "expected")
# Of these a recipe has one: where it gives the other, the parent's goes.
ONE_OF: tuple[tuple[KeyPath, KeyPath], ...] = (
    (("train", "epochs"), ("train", "iters")),
    (("train", "lora_parameters", "alpha"), ("train", "lora_parameters", "scale")),
    (("train", "lr_schedule", "warmup_steps"), ("train", "lr_schedule", "warmup_ratio")),
    (("train", "seed"), ("train", "seeds")),
)


@dataclass(frozen=True)
class Inherited:
    """A recipe's values laid over those of its parents.

    values: the merged values.
    sources: where each was written.
    faults: problems of the parents.
    parents: their files, the nearest first.
    """

    values: dict[str, Any]
    sources: Mapping[KeyPath, Source]
    faults: tuple[Fault, ...] = ()
    parents: tuple[Path, ...] = ()


def inherited(
    values: dict[str, Any],
    sources: Mapping[KeyPath, Source],
    path: Path,
    children: tuple[Path, ...] = (),
) -> Inherited:
    """Return the values of the recipe in `path`, laid over those of its parents.

    children: the recipes that extend this one. Values without `extends` are returned unchanged.
    """
    if EXTENDS not in values:
        return Inherited(values, sources)
    source = sources[(EXTENDS,)]
    own = {name: value for name, value in values.items() if name != EXTENDS}
    own_sources = {key: each for key, each in sources.items() if key[0] != EXTENDS}
    parent = _parent(values[EXTENDS], source, path, children)
    if isinstance(parent, Fault):
        return Inherited(own, own_sources, (parent,))
    text, unreadable = read_text(parent)
    if unreadable:
        fault = unreadable[0]
        found = f"{fault.where} {fault.found}"
        fix = suggestion(parent.name, yaml_files_beside(parent), fault.fix)
        return Inherited(own, own_sources, (Fault(str(source), found, fix),))
    reading = read_mapping(text, label_of(parent))
    faults = tuple(reading.faults)
    if is_mlx_lm_form(reading.value):
        found = f"{label_of(parent)} is an mlx-lm file"
        fix = "extend what `mlx-ft recipe upgrade` makes of it"
        return Inherited(own, own_sources, (*faults, Fault(str(source), found, fix)))
    above = inherited(reading.value, reading.sources, parent, (*children, path))
    below = {name: value for name, value in above.values.items() if name not in NOT_INHERITED}
    kept = {key: each for key, each in above.sources.items() if key[0] not in NOT_INHERITED}
    laid = _laid_over(below, kept, own, own_sources)
    return Inherited(*laid, (*faults, *above.faults), (parent, *above.parents))


def _parent(value: Any, source: Source, path: Path, children: tuple[Path, ...]) -> Path | Fault:
    """Return the file that a recipe extends, or the fault."""
    if not isinstance(value, str) or not value:
        return Fault(str(source), f"{shown(value)} is not a path", "name one YAML file")
    parent = path.parent / value
    line = [*children, path]
    if parent.resolve() in [each.resolve() for each in line]:
        names = " -> ".join(label_of(each) for each in (*line, parent))
        return Fault(str(source), f"it extends itself ({names})", "remove one of them")
    if len(line) > MOST_PARENTS:
        found = f"more than {MOST_PARENTS} recipes extend each other"
        return Fault(str(source), found, "write the values out in fewer files")
    return parent


def yaml_files_beside(path: Path) -> list[str]:
    """Return the names of the YAML files in the folder of a path; [] where it cannot be read."""
    try:
        return [each.name for each in path.parent.iterdir() if each.suffix in (".yaml", ".yml")]
    except (OSError, ValueError):
        return []


def _laid_over(
    below: dict[str, Any],
    below_sources: Mapping[KeyPath, Source],
    own: dict[str, Any],
    own_sources: Mapping[KeyPath, Source],
) -> tuple[dict[str, Any], dict[KeyPath, Source]]:
    """Return a recipe's own values over those below them, and the source of each."""
    replaced: list[KeyPath] = []

    def lay(under: dict[str, Any], over: Mapping[str, Any], at: KeyPath) -> dict[str, Any]:
        result = dict(under)
        for name, value in over.items():
            key = (*at, name)
            is_section = section_of(key) is not None
            if is_section and value is None:
                continue  # an empty section changes nothing
            beneath = under.get(name)
            if is_section and isinstance(value, dict) and isinstance(beneath, dict):
                result[name] = lay(beneath, value, key)
            else:
                result[name] = value
                replaced.append(key)
        return result

    values = lay(below, own, ())
    for pair in ONE_OF:
        for one, other in (pair, pair[::-1]):
            if _given(own, one) and not _given(own, other) and _given(below, other):
                values = _without(values, other)
                replaced.append(other)
    sources = {
        key: source
        for key, source in below_sources.items()
        if not any(key[: len(each)] == each for each in replaced)
    }
    return values, {**sources, **own_sources}


def _given(values: Any, key: KeyPath) -> bool:
    for part in key:
        values = values.get(part) if isinstance(values, dict) else None
    return values is not None


def _without(values: dict[str, Any], key: KeyPath) -> dict[str, Any]:
    """Return a copy of nested values without the one at `key`."""
    if len(key) == 1:
        return {name: value for name, value in values.items() if name != key[0]}
    return {**values, key[0]: _without(values[key[0]], key[1:])}


def changed_keys(own: Mapping[KeyPath, Source]) -> list[str]:
    """Return the dotted keys of the values that a recipe gives itself."""
    return [
        dotted(key)
        for key in own
        if key[0] not in (EXTENDS, *NOT_INHERITED)
        and section_of(key) is None
        and section_of(key[:-1]) is not None
    ]
