"""Pydantic errors to messages with file and line: plain values to a Recipe, or to all faults.

Does not: read files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mlx_ft.errors import Fault
from mlx_ft.recipe.fields import Conflict
from mlx_ft.recipe.keys import KeyPath, dotted, meant_keys, section_of
from mlx_ft.recipe.schema import Recipe
from mlx_ft.recipe.strict_yaml import Source, key_path, shown
from mlx_ft.text.suggestions import did_you_mean, suggestion

Said = tuple[str, str]
LAST = 10**9
NAME_RULE = "use letters, digits, '.', '_' and '-', beginning with a letter or digit, 80 at most"


def _type_fault(noun: str, fix: str) -> Callable[[ErrorDetails, KeyPath], Said]:
    return lambda error, key: (f"{shown(error['input'])} is not {noun}", fix)


def _limit_fault(limit: str, words: str) -> Callable[[ErrorDetails, KeyPath], Said]:
    def say(error: ErrorDetails, key: KeyPath) -> Said:
        return f"{shown(error['input'])} is out of range", f"use {words} {error['ctx'][limit]}"

    return say


def _section_fault(error: ErrorDetails, key: KeyPath) -> Said:
    section = section_of(key)
    keys = ", ".join(section.model_fields) if section else "none"
    given = error["input"]
    if key == ("data",) and isinstance(given, str):
        return f"{shown(given)} is not a section", f"write data: {{path: {given}}}"
    return f"{shown(given)} is not a section", f"write keys of its own under it ({keys})"


def _choice_fault(error: ErrorDetails, key: KeyPath) -> Said:
    choices = [
        part.strip("'") for part in error["ctx"]["expected"].replace(" or ", ", ").split(", ")
    ]
    found = f"{shown(error['input'])} is not one of {', '.join(choices)}"
    return found, suggestion(str(error["input"]), choices, "choose one of them")


def _pattern_fault(error: ErrorDetails, key: KeyPath) -> Said:
    if key == ("name",):
        return f"{shown(error['input'])} cannot name a folder", NAME_RULE
    return f"{shown(error['input'])} is not a date", "write year-month-day, such as 2025-01-31"


def _unknown_fault(error: ErrorDetails, key: KeyPath) -> Said:
    section = section_of(key[:-1])
    known = ", ".join(section.model_fields) if section else ""
    if "." in key[-1]:
        return "is not a known key", "write sections, each level indented under the one above"
    return "is not a known key", did_you_mean(meant_keys(key), f"the keys here are {known}")


def _missing_fault(error: ErrorDetails, key: KeyPath) -> Said:
    if key == ("data",):
        return "is missing", "add it: data: {path: FOLDER}, with train.jsonl and valid.jsonl in it"
    section = section_of(key[:-1])
    assert section is not None, f"{key} is missing outside of any section"
    return "is missing", f"add it: {section.model_fields[key[-1]].description}"


def _value_fault(error: ErrorDetails, key: KeyPath) -> Said:
    if key[-1] == "date":
        return f"{shown(error['input'])} is not a day of the calendar", "write a date that exists"
    return f"{shown(error['input'])} cannot be read", error["msg"]


QUOTE = "write text, in quotes if it looks like a number or like true"
SAY: Mapping[str, Callable[[ErrorDetails, KeyPath], Said]] = {
    "missing": _missing_fault,
    "extra_forbidden": _unknown_fault,
    "int_type": _type_fault("a whole number", "write a whole number, such as 8"),
    "float_type": _type_fault("a number", "write a number, such as 1e-5"),
    "finite_number": _type_fault("a finite number", "write a number, such as 1e-5"),
    "bool_type": _type_fault("true or false", "write true or false"),
    "string_type": _type_fault("text", QUOTE),
    "list_type": _type_fault("a list", "write a list, such as [a, b]"),
    "dict_type": _type_fault("a section", "write options under it, such as {weight_decay: 0.01}"),
    "model_type": _section_fault,
    "literal_error": _choice_fault,
    "greater_than": _limit_fault("gt", "more than"),
    "greater_than_equal": _limit_fault("ge", "at least"),
    "less_than": _limit_fault("lt", "less than"),
    "less_than_equal": _limit_fault("le", "at most"),
    "string_too_short": lambda error, key: ("is empty", "write what it names, or leave it out"),
    "too_short": lambda error, key: ("is an empty list", "name at least one, or leave it out"),
    "string_pattern_mismatch": _pattern_fault,
    "value_error": _value_fault,
}


def _without(values: Mapping[str, Any], keys: set[KeyPath]) -> dict[str, Any]:
    """Return nested mappings without the entries at `keys`."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        inner = {key[1:] for key in keys if key[0] == name and len(key) > 1}
        if (name,) in keys:
            continue
        kept[name] = _without(value, inner) if inner and isinstance(value, dict) else value
    return kept


def without_empty_sections(values: Mapping[str, Any], inside: KeyPath = ()) -> dict[str, Any]:
    """Return the values without sections that have nothing under them, which mean the defaults."""
    kept = {}
    for name, value in values.items():
        key = (*inside, name)
        if section_of(key) is None:
            kept[name] = value
        elif isinstance(value, dict):
            kept[name] = without_empty_sections(value, key)
        elif value is not None:
            kept[name] = value
    return kept


class Places:
    """Says where each key was written, for faults."""

    def __init__(self, sources: Mapping[KeyPath, Source], label: str) -> None:
        self.sources = sources
        self.label = label

    def fault(self, key: KeyPath, found: str, fix: str) -> tuple[int, Fault]:
        """Return the line, for sorting, and the fault at `key` or at the section it belongs to."""
        source = self.sources.get(key)
        if source is not None:
            return source.line or LAST, Fault(str(source), found, fix)
        for depth in range(len(key) - 1, 0, -1):
            parent = self.sources.get(key[:depth])
            if parent is not None:
                return parent.line or LAST, Fault(f"{parent.where} {dotted(key)}", found, fix)
        return LAST, Fault(f"{self.label} {dotted(key)}", found, fix)

    def conflict(self, conflict: Conflict) -> tuple[int, Fault]:
        """Return the line and the fault of a conflict, at the first of its keys that was given."""
        keys = [tuple(key.split(".")) for key in conflict.keys]
        if conflict.item is not None:
            return self.fault((*keys[0], conflict.item), conflict.found, conflict.fix)
        given = [key for key in keys if key in self.sources]
        written = [key for key in given if self.sources[key].line] or given or keys
        return self.fault(written[0], conflict.found, conflict.fix)


def _field_key(location: tuple[int | str, ...]) -> KeyPath:
    """Return the key path of the section's value that an error lies in (list items left out)."""
    key: KeyPath = ()
    for part in location:
        key = (*key, str(part))
        if section_of(key) is None:
            break
    return key


def check(
    values: Mapping[str, Any], sources: Mapping[KeyPath, Source], label: str
) -> tuple[Recipe | None, list[Fault]]:
    """Return the Recipe of these values, or None and every fault, in the order of the lines.

    Wrong values are taken out and the rest is checked again, so that conflicts between the others
    are found in the same pass. Conflicts that involve a wrong value are not reported.
    """
    places = Places(sources, label)
    values = without_empty_sections(values)
    conflicts: list[Conflict] = []
    recipe = None
    errors: list[ErrorDetails] = []
    try:
        recipe = Recipe.model_validate(values, context={"conflicts": conflicts})
    except ValidationError as error:
        errors = error.errors(include_url=False)
    placed: list[tuple[int, Fault]] = []
    asked_for: set[str] = set()
    wrong: set[KeyPath] = set()
    missing: list[tuple[str, tuple[int, Fault]]] = []
    for detail in errors:
        key = key_path(detail["loc"])
        say = SAY.get(detail["type"], _value_fault)
        entry = places.fault(key, *say(detail, key))
        if detail["type"] == "missing":
            missing.append((dotted(key), entry))
            continue
        wrong.add(_field_key(detail["loc"]))
        placed.append(entry)
        if detail["type"] == "extra_forbidden":
            asked_for.update(meant_keys(key))
    placed += [entry for key, entry in missing if key not in asked_for]
    if errors:
        conflicts.clear()
        # What is still wrong is only what is missing, and that is noted already.
        with contextlib.suppress(ValidationError):
            Recipe.model_validate(_without(values, wrong), context={"conflicts": conflicts})
    names = {dotted(key) for key in wrong}
    placed += [places.conflict(each) for each in conflicts if not names & set(each.keys)]
    faults = [fault for _, fault in sorted(placed, key=lambda entry: entry[0])]
    return (None if faults else recipe), faults
