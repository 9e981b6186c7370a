"""LoadedRecipe back to YAML: resolved (every value with its origin), or upgraded from mlx-lm's
form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mlx_ft.recipe.fields import Section
from mlx_ft.recipe.keys import (
    KeyPath,
    dotted,
    value_at,
    value_keys,
)
from mlx_ft.recipe.load import ALPHA, DEFAULT, DERIVED, EPOCHS, ITERS, SCALE, LoadedRecipe
from mlx_ft.recipe.mlx_lm_keys import MLX_LM_DEFAULT
from mlx_ft.recipe.schema import DataRecipe, Recipe
from mlx_ft.recipe.strict_yaml import (
    label_of,
    read_yaml,
    shown,
)

PLAIN = re.compile(r"[A-Za-z_./~][A-Za-z0-9_./@+~-]*")
BREAKS = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def yaml_text(value: Any) -> str:
    """Return a value of a recipe as YAML on one line that reads back as the same value."""
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_text, value))}]"
    if isinstance(value, Section):
        value = value.model_dump()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{yaml_text(k)}: {yaml_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, float):
        # YAML 1.1 readers take 1e-05 for text.
        mantissa, exponent, power = repr(value).partition("e")
        return f"{mantissa}{'.0' if exponent and '.' not in mantissa else ''}{exponent}{power}"
    if value is None or isinstance(value, bool):
        return shown(value)
    if isinstance(value, int):
        return str(value)
    text = str(value)
    if PLAIN.fullmatch(text) and read_yaml(text, "").value == text:
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return BREAKS.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)


def _written(recipe: Recipe, comments: Mapping[KeyPath, str]) -> str:
    """Return the values that have a comment, as YAML lines under their sections."""
    lines: list[tuple[str, str]] = []
    opened: set[KeyPath] = set()
    for key in value_keys():
        if key not in comments:
            continue
        for depth in range(1, len(key)):
            if key[:depth] not in opened:
                opened.add(key[:depth])
                lines.append((f"{'  ' * (depth - 1)}{key[depth - 1]}:", ""))
        value = yaml_text(value_at(recipe, key))
        lines.append((f"{'  ' * (len(key) - 1)}{key[-1]}: {value}", comments[key]))
    width = min(48, max(len(line) for line, _ in lines))
    return "".join(
        f"{line:<{width}}  # {comment}\n" if comment else f"{line}\n" for line, comment in lines
    )


def dump_resolved(loaded: LoadedRecipe) -> str:
    """Return recipe.yaml: every value with its origin. Loading it gives an equal recipe."""
    title = "# Resolved recipe: every value, and where it came from.\n"
    comments = {key: loaded.origins[dotted(key)] for key in value_keys()}
    return title + _written(loaded.recipe, comments)


def upgrade_text(loaded: LoadedRecipe) -> str:
    """Return a recipe with all values that were given or that differ from a recipe's defaults.

    Loading it gives an equal recipe, for every form of the file that it was loaded from.
    """
    recipe = loaded.recipe
    plain = Recipe(name=recipe.name, model=recipe.model, data=DataRecipe(path=recipe.data.path))
    comments = {}
    for key in value_keys():
        origin = loaded.origins[dotted(key)]
        value = value_at(recipe, key)
        given = origin not in (DEFAULT, DERIVED, MLX_LM_DEFAULT) and value is not None
        if given or value != value_at(plain, key) or dotted(key) in ("name", "model", "data.path"):
            comments[key] = origin
    # These two defaults are only there when the other key of the pair is not.
    for instead, default in ((ITERS, EPOCHS), (ALPHA, SCALE)):
        if value_at(recipe, instead) is not None:
            comments.pop(default, None)
    title = f"# Written by `mlx-ft recipe upgrade` from {label_of(loaded.file)}.\n"
    if loaded.adapter_path is not None:
        title += f"# The adapter goes into the run's folder, no longer to {loaded.adapter_path}.\n"
    return title + _written(recipe, comments)
