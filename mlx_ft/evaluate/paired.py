"""Two models on the same prompts: is one better, or is that chance?

Does: pair scores by prompt and judge them with an exact test. Does not: compare means of different
prompts, or correct for many comparisons (each verdict stands for itself).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_ft.runs import hash_of

SIGNIFICANCE = 0.05
Verdict = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True)
class Paired:
    """Scores of a model against another's on `n` prompts that both answered.

    `difference` is the mean of (its score - the other's), `wins` and `losses` count the prompts
    where it is positive or negative, `p` is the two-sided exact sign test's.
    """

    n: int
    difference: float
    wins: int
    losses: int
    p: float
    verdict: Verdict


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided exact p of so many wins and losses if either were as likely.

    Ties tell nothing about the direction and are left out (Dixon and Mood 1946); with scores of 0
    and 1 it is McNemar's exact test.
    """
    decided = wins + losses
    tail = sum(math.comb(decided, k) for k in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail / 2**decided))


def paired(scores: Sequence[float], others: Sequence[float]) -> Paired:
    """Return how `scores` stand against `others`, prompt by prompt; there must be some."""
    differences = [mine - theirs for mine, theirs in zip(scores, others, strict=True)]
    assert differences, "nothing was answered by both"
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    p = sign_test(wins, losses)
    verdict: Verdict = "no difference shown"
    if p < SIGNIFICANCE:
        verdict = "better" if wins > losses else "worse"
    mean = math.fsum(differences) / len(differences)
    return Paired(len(differences), mean, wins, losses, p, verdict)


def prompt_key(row: Mapping[str, Any]) -> str:
    """Return what makes two rows of sample logs answers to the same question: what was asked, how
    it was scored against what, but not by whom it was answered.
    """
    return hash_of([row.get(name) for name in ("id", "messages", "target")])


def paired_rows(
    rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> Paired | None:
    """Return how one sample log stands against another's, None when they share no prompt."""
    theirs = {prompt_key(row): row["score"] for row in others if _scored(row)}
    mine = {prompt_key(row): row["score"] for row in rows if _scored(row)}
    shared = [key for key in mine if key in theirs]
    if not shared:
        return None
    return paired([mine[key] for key in shared], [theirs[key] for key in shared])


def _scored(row: Mapping[str, Any]) -> bool:
    score = row.get("score")
    return isinstance(score, (int, float)) and not isinstance(score, bool) and math.isfinite(score)
