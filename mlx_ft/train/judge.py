"""Which prompts choose a checkpoint, and the asking of them while a model is trained.

Does: take the prompts from their suite, keep them apart from those of the evaluation, and have the
model in training answer them, scored as the evaluation scores. Does not: decide when it is asked,
or compare scores (the training room does).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_ft.evaluate.checkpoint_prompts import chooser
from mlx_ft.evaluate.stats import wilson_interval
from mlx_ft.evaluate.suites import Suite
from mlx_ft.recipe.schema import Recipe, SelectRecipe
from mlx_ft.system.files import hash_of

if TYPE_CHECKING:
    from mlx_ft.engine.load import LoadedModel
    from mlx_ft.train.contract import Judge, Judgement


FOLDER = "selection"


def judge(recipe: Recipe, loaded: LoadedModel, folder: Path) -> Judge | None:
    """Return who asks the model in training, or None when the recipe wants nobody to.

    Answers are kept as `folder/selection/<suite>/<iteration>.jsonl`. Always all prompts together:
    the same weights then give the same answers, whatever was interrupted.
    """
    suite = chooser(recipe.train.select)
    if suite is None:
        return None
    from mlx_ft.evaluate.harness import evaluate_column, questions_of
    from mlx_ft.evaluate.local_model import loaded_column
    from mlx_ft.train.contract import Judge

    def ask(iteration: int, alive: Callable[[], None]) -> Judgement:
        column = f"{iteration:07d}"
        (folder / FOLDER / suite.name / f"{column}.jsonl").unlink(missing_ok=True)
        sha256, batch_size = hash_of([str(folder), iteration]), recipe.eval.batch_size
        (result,) = evaluate_column(
            [suite],
            loaded_column(column, loaded, sha256, batch_size=batch_size),
            folder / FOLDER,
            progress=_SignOfLife(alive),
        )
        return _judgement(suite, recipe.train.select, dict(result.summary))

    prompts = [question.ids or () for question in questions_of(suite, loaded.renderer)]
    return Judge(ask, sum(map(len, prompts)) + suite.max_tokens * len(prompts))


@dataclass(frozen=True)
class _SignOfLife:
    """Progress that only shows that the process is alive."""

    alive: Callable[[], None]

    def update(self, done: float, text: str = "") -> None:
        self.alive()


def _judgement(suite: Suite, select: SelectRecipe, summary: dict[str, float]) -> Judgement:
    from mlx_ft.train.contract import Judgement

    n = len(suite.samples)
    if select.by == "mean":
        return Judgement(suite.name, summary["mean"], n, summary["low"], summary["high"])
    share = summary["passed"] / n
    return Judgement(suite.name, share, n, *wilson_interval(share, n))
