"""Score a checkpoint with a suite, as the evaluation scores.

Does: have the model in training answer the prompts that select weights. Does not: decide when, or
compare scores (`selection.py`).
"""

from __future__ import annotations

from pathlib import Path

from mlx_ft.engine.load import LoadedModel
from mlx_ft.evaluate.checkpoint_prompts import chooser
from mlx_ft.evaluate.harness import evaluate_column, questions_of
from mlx_ft.evaluate.local_model import loaded_column
from mlx_ft.evaluate.stats import wilson_interval
from mlx_ft.evaluate.suites import Suite
from mlx_ft.recipe.schema import Recipe, SelectRecipe
from mlx_ft.system.console import Progress
from mlx_ft.system.files import hash_of
from mlx_ft.train.contract import Judge, Judgement

FOLDER = "selection"


def judge_of(recipe: Recipe, loaded: LoadedModel, folder: Path) -> Judge | None:
    """Return the judge of a model in training, None when no suite selects its weights.

    Answers are kept as `folder/selection/<suite>/<iteration>.jsonl`. All prompts are always asked
    together: the same weights then give the same answers, after any interruption.
    """
    suite = chooser(recipe.train.select)
    if suite is None:
        return None

    def ask(iteration: int, progress: Progress) -> Judgement:
        column = f"{iteration:07d}"
        (folder / FOLDER / suite.name / f"{column}.jsonl").unlink(missing_ok=True)
        sha256, batch_size = hash_of([str(folder), iteration]), recipe.eval.batch_size
        (result,) = evaluate_column(
            [suite],
            loaded_column(column, loaded, sha256, batch_size=batch_size),
            folder / FOLDER,
            progress=progress,
        )
        return _judgement(suite, recipe.train.select, dict(result.summary))

    prompts = [question.ids or () for question in questions_of(suite, loaded.renderer)]
    return Judge(ask, sum(map(len, prompts)) + suite.max_tokens * len(prompts))


def _judgement(suite: Suite, select: SelectRecipe, summary: dict[str, float]) -> Judgement:
    n = len(suite.samples)
    if select.by == "mean":
        return Judgement(suite.name, summary["mean"], n, summary["low"], summary["high"])
    share = summary["passed"] / n
    return Judgement(suite.name, share, n, *wilson_interval(share, n))
