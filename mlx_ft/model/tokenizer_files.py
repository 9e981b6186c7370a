"""A model folder's tokenizer, stop tokens, and templates with pinned dates.

Does not: render anything (`chat.py`).
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault, ModelError

STRFTIME_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
ANY_STRFTIME_CALL = re.compile(r"strftime_now\s*\(")


@functools.lru_cache(maxsize=16)
def pin_date(template: str, day: datetime.date) -> str:
    """Return the template with each literal `strftime_now("...")` replaced by the text for `day`.

    Templates of the Llama 3 family print today's date, so that a prompt would change overnight.
    """

    def replacement(match: re.Match[str]) -> str:
        return json.dumps(day.strftime(match.group(2)))

    return STRFTIME_CALL.sub(replacement, template)


def load_tokenizer(folder: Path) -> Any:
    # That PyTorch is not installed is no news to a user of MLX.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # a broken file raises anything, a bare Exception out of Rust too
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            Fault(str(folder), f"no usable tokenizer ({first_line})", "use a complete model folder")
        ) from error


def stop_ids_of(tokenizer: Any, folder: Path) -> frozenset[int]:
    """Return every id that ends generation: the tokenizer's, and those of the model's own files."""
    found: set[int] = set()
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.exists():
            try:
                value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            except (OSError, ValueError, AttributeError) as error:
                raise ModelError(
                    Fault(str(path), f"not a JSON object ({error})", "download it again")
                ) from error
            values = value if isinstance(value, list) else [value]
            found.update(int(v) for v in values if isinstance(v, int))
    return frozenset(found)
