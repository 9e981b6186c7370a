"""The thinking mode recorded in a model folder, in generation_config.json.

Does not: change a chat template, or apply the mode (`chat.py`).

There is no standard key. This one is used by some publishers, and is named after the option of
servers such as vLLM. mlx-lm and transformers ignore it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_ft.system.files import read_json, write_json

FILE = "generation_config.json"
KEY = "default_chat_template_kwargs"
# transformers takes these from config.json only where there is no FILE.
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_thinking_mode(folder: Path, enable_thinking: bool) -> None:
    """Record the thinking mode in a model folder; the file's other entries stay."""
    said = _said(folder / FILE)
    if not said:
        config = _said(folder / "config.json")
        said = {key: config[key] for key in TOKEN_KEYS if key in config}
    arguments = said.get(KEY)
    kept = dict(arguments) if isinstance(arguments, Mapping) else {}
    write_json(folder / FILE, {**said, KEY: {**kept, "enable_thinking": enable_thinking}})


def thinking_mode_of(folder: Path) -> bool | None:
    """Return the mode that a model folder names, or None."""
    arguments = _said(folder / FILE).get(KEY)
    mode = arguments.get("enable_thinking") if isinstance(arguments, Mapping) else None
    return mode if isinstance(mode, bool) else None


def _said(file: Path) -> dict[str, Any]:
    """Return a file's JSON object; an empty one where there is none that can be read."""
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return {}
    return dict(found) if isinstance(found, dict) else {}
