"""Ordinary prompts and the base model's own answers to them, as rows beside a recipe's.

Does: hold the prompts, say how many rows a share stands for, make rows of answers. Does not: ask a
model (`replay.py` of the package does), or read a recipe's files.

Why: rows of one kind alone teach a model to answer in that kind always; its own answers hold the
rest in place (Huang et al., arXiv 2403.01244, call it self-synthesized rehearsal).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from mlx_ft.data.formats import Row

PROMPTS_FILE = Path(__file__).with_name("replay_prompts.txt")
CATEGORY = "replay"


def replay_prompts() -> tuple[str, ...]:
    """Return the prompts: greetings, small talk, facts, sums, instructions, explanations."""
    return tuple(PROMPTS_FILE.read_text(encoding="utf-8").splitlines())


def prompts_sha256() -> str:
    """Return a hash of the prompts, on which the rows depend."""
    return hashlib.sha256(PROMPTS_FILE.read_bytes()).hexdigest()


def rows_wanted(rows: int, share: float) -> int:
    """Return how many rows must be added to so many for the added ones to be that share of all."""
    return max(1, round(rows * share / (1 - share)))


def replay_rows(answers: Mapping[str, str]) -> tuple[Row, ...]:
    """Return a row for each prompt and its answer; they stand in no file, so that their lines count
    down from -1.
    """
    return tuple(
        Row(
            line=-number,
            form="messages",
            messages=(
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ),
            text=None,
            tools=None,
            category=CATEGORY,
        )
        for number, (prompt, answer) in enumerate(answers.items(), start=1)
    )
