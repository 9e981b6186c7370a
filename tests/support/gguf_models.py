"""Configs and tokenizers of models that can become GGUF files."""

import json
from pathlib import Path
from typing import Any

from mlx_ft.model.gguf_support import ARCHITECTURES
from tests.support.models import TINY_CONFIGS

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: config for name, config in TINY_CONFIGS.items() if name in ARCHITECTURES},
    "llama3": TINY_CONFIGS["llama"] | {"rope_scaling": LLAMA3},
    "linear": TINY_CONFIGS["llama"] | {"rope_scaling": LINEAR},
    "gemma linear": TINY_CONFIGS["gemma3_text"] | {"rope_scaling": LINEAR},
    "llama with biases": TINY_CONFIGS["llama"] | {"attention_bias": True, "mlp_bias": True},
    "odd width": TINY_CONFIGS["llama"] | {"intermediate_size": 80},
}
PATCHED = TINY_CONFIGS["llama"] | {"vocab_size": 325}


def patch_tokenizer(folder: Path, steps: list[str], ignore_merges: bool) -> dict[str, Any]:
    """Give the tiny tokenizer the pre-tokenizer of SmolLM2 (digits), Qwen2 or Llama 3, which the
    expressions for numbers tell apart, and three tokens of several digits, which show it.
    """
    path = folder / "tokenizer.json"
    described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    first: list[dict[str, Any]] = []
    for step in steps:
        if step == "digits":
            first.append({"type": "Digits", "individual_digits": True})
            continue
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ).replace("NUMBER", step)
        split = {"type": "Split", "pattern": {"Regex": pattern}}
        first.append(split | {"behavior": "Isolated", "invert": False})
    last = bytes_only | {"use_regex": not steps or steps == ["digits"]}
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*first, last]}
    model = described["model"]
    model["vocab"] |= {"12": 320, "34": 321, "1234": 322}
    model["merges"] += [["1", "2"], ["3", "4"], ["12", "34"]]
    model["ignore_merges"] = ignore_merges
    path.write_text(json.dumps(described), encoding="utf-8")
    return described
