"""Learning-rate schedules: pure functions of the optimizer update.

Counted in optimizer updates, never in mini-batches: mlx-lm's schedules end early under gradient
accumulation because its callers count the one and its optimizer the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mlx_ft.recipe.schema import LrSchedule


def learning_rate_at(
    schedule: LrSchedule, learning_rate: float, updates: int
) -> Callable[[int], float]:
    """Return the function update (from 0) -> learning rate for a run of `updates` in all.

    Warm-up rises linearly from `warmup_init` and reaches `learning_rate` at the first update after
    it. Cosine decays as in SGDR (Loshchilov & Hutter, arXiv 1608.03983, eq. 5); with restarts, each
    cycle has the same length and starts again at `learning_rate`.
    """
    warmup = schedule.warmup_updates(updates)
    decay = schedule.decay_steps or max(1, updates - warmup)
    cycle = decay / schedule.cycles

    def rate(update: int) -> float:
        if update < warmup:
            share = update / warmup
            return schedule.warmup_init + (learning_rate - schedule.warmup_init) * share
        step = update - warmup
        if schedule.name == "constant":
            return learning_rate
        if step >= decay:
            return schedule.end
        if schedule.name == "linear":
            return learning_rate + (schedule.end - learning_rate) * step / decay
        share = math.fmod(step, cycle) / cycle
        return schedule.end + (learning_rate - schedule.end) * (1 + math.cos(math.pi * share)) / 2

    return rate
