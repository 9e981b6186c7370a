"""A recipe made small, so that every stage can be gone through in minutes before hours are spent.

Does: say which values a rehearsal changes, and how. Does not: run it, or judge what it makes.
"""

from __future__ import annotations

from mlx_ft.recipe.schema import Recipe

SUFFIX = "-rehearsal"
LEAST_ROWS = 8
UPDATES = 2
PROMPTS_PER_SUITE = 2


def rehearsal_sets(recipe: Recipe) -> tuple[str, ...]:
    """Return the `KEY=VALUE` settings that make a rehearsal of a recipe: two optimizer updates on a
    few rows, with a report, a validation and a checkpoint after each, and two prompts a suite that
    no gate judges.

    Model, adapter, batch, lengths and export stay as they are: what fails with them fails now. Two
    updates teach nothing that could survive, so that is not asked, and no bits are chosen by it.
    """
    train = recipe.train
    window = train.grad_accumulation_steps
    values = {
        "name": f"{recipe.name[: 80 - len(SUFFIX)]}{SUFFIX}",
        "data.limit": max(LEAST_ROWS, train.batch_size),
        "train.epochs": "null",
        "train.iters": UPDATES * window,
        "train.steps_per_report": window,
        "train.steps_per_eval": window,
        "train.save_every": window,
        "train.lr_schedule.allow_unfinished": "true",
        "train.report_to": "[]",
        "eval.limit": PROMPTS_PER_SUITE,
        "eval.gates": "{}",
        "export.min_survival": "null",
        "export.q_bits": recipe.export.most_bits,
    }
    if train.select.by is not None:
        values |= {"train.select.every": window, "train.select.limit": PROMPTS_PER_SUITE}
    if train.seeds:
        values |= {"train.seeds": "[]", "train.seed": train.seeds[0]}
    return tuple(f"{key}={value}" for key, value in values.items())
