"""YAML file and `--set` options to a LoadedRecipe, with the origin of each value.

Does: read a recipe or mlx-lm's flat form, apply `--set`, and report all faults at once.
Does not: look at the data, the model or the machine; import mlx.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_ft.errors import Fault, RecipeError
from mlx_ft.recipe.extends import changed_keys, inherited, yaml_files_beside
from mlx_ft.recipe.keys import (
    KeyPath,
    dotted,
    meant_keys,
    section_of,
    value_keys,
)
from mlx_ft.recipe.mlx_lm import from_mlx_lm, is_mlx_lm_form
from mlx_ft.recipe.mlx_lm_keys import FLAT_KEYS, MLX_LM_DEFAULT
from mlx_ft.recipe.schema import Recipe
from mlx_ft.recipe.strict_yaml import (
    Source,
    header_of,
    label_of,
    read_mapping,
    read_text,
    read_yaml,
)
from mlx_ft.recipe.validate import check
from mlx_ft.text.suggestions import did_you_mean, suggestion

SET = "--set"
DEFAULT = "default"
DERIVED = "derived"
MOST_FAULTS = 100
EPOCHS, ITERS = ("train", "epochs"), ("train", "iters")
ALPHA, SCALE = (("train", "lora_parameters", name) for name in ("alpha", "scale"))
INSTEAD: Mapping[KeyPath, KeyPath] = {EPOCHS: ITERS, ITERS: EPOCHS, ALPHA: SCALE, SCALE: ALPHA}
NESTED_FLAT_KEYS = ("lora_parameters", "lr_schedule", "optimizer_config")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and the origins of its values.

    origins: dotted key ("train.batch_size") -> "FILE:LINE", "--set", "default", "derived" or
    "mlx-lm default". Values of an extended recipe have that file's line.
    notes: how the keys of mlx-lm's flat form were read, and what a recipe extends and changes.
    adapter_path: folder for the adapter of a flat file (None for a recipe).
    header: the comment at the top of the file.
    """

    recipe: Recipe
    origins: Mapping[str, str]
    file: Path
    notes: tuple[str, ...]
    form: Literal["recipe", "mlx-lm"]
    header: str
    adapter_path: Path | None


@dataclass
class _Draft:
    """Values on their way to a Recipe: nested mappings, and where each of them was written."""

    values: dict[str, Any]
    sources: dict[KeyPath, Source]

    def set(self, key: KeyPath, value: Any, sources: Mapping[KeyPath, Source]) -> None:
        """Put a value at a key path, make the sections on the way, and drop earlier values there.

        A text or list in place of a section is left for the checks to report.
        """
        node = self.values
        for part in key[:-1]:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                return
        node[key[-1]] = value
        for old in [each for each in self.sources if each[: len(key)] == key]:
            del self.sources[old]
        self.sources.update(sources)


@dataclass(frozen=True)
class _Setting:
    """One `--set KEY=VALUE`, read."""

    key: KeyPath
    value: Any
    sources: Mapping[KeyPath, Source]


def _read_set(text: str) -> _Setting | list[Fault]:
    """Read one KEY=VALUE. The value is YAML."""
    name, equals, value_text = text.partition("=")
    key = tuple(part.strip() for part in name.split("."))
    label = f"{SET} {name.strip()}" if name.isprintable() else f"{SET} {name!r}"
    if not equals or not all(key):
        return [Fault(f"{SET} {text!r}", "is not KEY=VALUE", "write --set train.batch_size=2")]
    reading = read_yaml(value_text, label)
    if reading.faults:
        return [Fault(label, fault.found, fault.fix) for fault in reading.faults]
    sources = {(*key, *inner): Source(SET, dotted((*key, *inner))) for inner in reading.sources}
    return _Setting(key, reading.value, {key: Source(SET, dotted(key)), **sources})


def _read_sets(sets: Sequence[str]) -> tuple[list[_Setting], list[Fault]]:
    settings: list[_Setting] = []
    faults: list[Fault] = []
    for text in sets:
        result = _read_set(text)
        if isinstance(result, _Setting):
            settings.append(result)
        else:
            faults.extend(result)
    return settings, faults


def _is_flat_key(key: KeyPath) -> bool:
    """Return whether a `--set` key is mlx-lm's, and not a recipe's (such as `train.x`)."""
    return key[0] in FLAT_KEYS if len(key) == 1 else key[0] in NESTED_FLAT_KEYS


def _unknown_key(key: KeyPath) -> Fault | None:
    """Return a fault for a `--set` key that no recipe has, except for an optimizer's options."""
    for depth in range(1, len(key) + 1):
        section = section_of(key[: depth - 1])
        if section is None:
            break
        if key[depth - 1] not in section.model_fields:
            fix = did_you_mean(meant_keys(key), "docs/reference.md lists all keys")
            return Fault(f"{SET} {dotted(key)}", "is not a known key", fix)
    if len(key) > 1 and section_of(key[:-1]) is None and key[:-1] != ("train", "optimizer_config"):
        found = f"{key[-1]} lies inside a value"
        return Fault(f"{SET} {dotted(key)}", found, f"set {dotted(key[:-1])} as a whole")
    return None


def _apply(draft: _Draft, settings: Iterable[_Setting]) -> list[Fault]:
    """Put the settings into the draft. One of a pair replaces the other's default."""
    faults = []
    for setting in settings:
        fault = _unknown_key(setting.key)
        if fault is None:
            draft.set(setting.key, setting.value, setting.sources)
            other = INSTEAD.get(setting.key)
            if other in draft.sources and draft.sources[other].where == MLX_LM_DEFAULT:
                draft.set(other, None, {})
        else:
            faults.append(fault)
    return faults


def _name_from(path: Path) -> str:
    """Return a run name made of the file's name."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem)[:80]
    return re.sub(r"^[^A-Za-z0-9]+", "", name) or "recipe"


def _origin(draft: _Draft, key: KeyPath) -> str:
    """Return where the value at `key` came from: itself, a part of it, or the --set around it."""
    inside = [source for each, source in draft.sources.items() if each[: len(key)] == key]
    if any(source.where == SET for source in inside):
        return SET
    return draft.sources[key].where if key in draft.sources else DEFAULT


def _in_file_order(faults: list[Fault], label: str) -> list[Fault]:
    """Return the faults by line. Faults without a line (`--set`, missing keys) come last.

    A file with very many faults is not a recipe, so the rest is only counted.
    """
    line_of = re.compile(re.escape(label) + r":([0-9]+)")

    def line(fault: Fault) -> float:
        found = line_of.match(fault.where)
        return int(found[1]) if found else math.inf

    ordered = sorted(faults, key=line)
    if len(ordered) > MOST_FAULTS:
        more = Fault(label, f"{len(ordered) - MOST_FAULTS} more faults", "mend the others first")
        ordered = [*ordered[:MOST_FAULTS], more]
    return ordered


def _near_files(path: Path) -> str:
    names = yaml_files_beside(path)
    return suggestion(
        path.name, names, "check the path", written=lambda name: str(path.parent / name)
    )


def _with_parents(draft: _Draft, path: Path, faults: list[Fault]) -> tuple[_Draft, tuple[str, ...]]:
    """Return the draft laid over its parents, and a note about them. Adds to the faults."""
    found = inherited(draft.values, draft.sources, path)
    faults += found.faults
    notes: tuple[str, ...] = ()
    if found.parents:
        line = " < ".join(label_of(parent) for parent in found.parents)
        notes = (f"extends {line}; changed: {', '.join(changed_keys(draft.sources)) or 'nothing'}",)
    return _Draft(copy.deepcopy(found.values), dict(found.sources)), notes


def load_recipe(path: Path, sets: Sequence[str] = ()) -> LoadedRecipe:
    """Return the recipe in a YAML file, in our form or mlx-lm's flat one, with `--set`s applied.

    Raises RecipeError with every fault of the file and of the sets.
    """
    text, unreadable = read_text(path)
    if unreadable:
        fault = unreadable[0]
        missing = fault.found == "does not exist"
        raise RecipeError(
            Fault(fault.where, fault.found, _near_files(path) if missing else fault.fix)
        )
    label = label_of(path)
    reading = read_mapping(text, label)
    if reading.faults and not reading.value:
        raise RecipeError(_in_file_order(list(reading.faults), label))
    settings, faults = _read_sets(sets)
    faults = [*reading.faults, *faults]
    draft = _Draft(copy.deepcopy(reading.value), dict(reading.sources))
    flat = is_mlx_lm_form(draft.values)
    notes: tuple[str, ...] = ()
    adapter_path = None
    if flat:
        for setting in settings:
            if _is_flat_key(setting.key):
                draft.set(setting.key, setting.value, setting.sources)
        settings = [setting for setting in settings if not _is_flat_key(setting.key)]
        translation = from_mlx_lm(draft.values, draft.sources, label)
        draft = _Draft(translation.values, dict(translation.sources))
        faults += translation.faults
        notes, adapter_path = translation.notes, translation.adapter_path
    else:
        draft, notes = _with_parents(draft, path, faults)
    faults += _apply(draft, settings)
    if draft.values.get("name") is None:
        draft.values["name"] = _name_from(path)
        draft.sources[("name",)] = Source(DERIVED, "name")
    recipe, wrong = check(draft.values, draft.sources, label)
    reported = {fault.where for fault in faults}
    faults += [fault for fault in wrong if fault.where not in reported]
    if faults or recipe is None:
        raise RecipeError(_in_file_order(faults, label))
    origins = {dotted(key): _origin(draft, key) for key in value_keys()}
    # The suites that gates name are looked up later, and a fault wants its line.
    gates = [("eval", "gates", name) for name in recipe.eval.gates]
    origins |= {dotted(key): _origin(draft, key) for key in gates}
    form: Literal["recipe", "mlx-lm"] = "mlx-lm" if flat else "recipe"
    return LoadedRecipe(recipe, origins, path, notes, form, header_of(text), adapter_path)
