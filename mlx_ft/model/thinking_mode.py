"""The thinking mode of a model folder, where whoever has only the folder finds it.

Does: write it into generation_config.json and read it there. Does not: change a chat template, or
apply the mode (`chat.py`).

No key is agreed upon. This one, in this file, is what some publishers use, and the name of the
option that servers such as vLLM have for it; mlx-lm and transformers leave it alone.
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
    """Say in a model folder how its template is to be called; what else the file says stays."""
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
