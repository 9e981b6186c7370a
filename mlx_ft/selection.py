"""Which prompts choose a checkpoint, and the asking of them while a model is trained.

Does: take the prompts from their suite, keep them apart from those of the evaluation, and have the
model in training answer them, scored as the evaluation scores. Does not: decide when it is asked,
or compare scores (the training room does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_ft.errors import DataError, Fault
from mlx_ft.evaluate.stats import wilson_interval
from mlx_ft.evaluate.suites import Sample, Suite, load_suite
from mlx_ft.recipe.schema import Recipe, SelectRecipe
from mlx_ft.system.files import hash_of
from mlx_ft.text.near_duplicates import words_of

if TYPE_CHECKING:
    from mlx_ft.engine.load import LoadedModel
    from mlx_ft.preflight import Finding
    from mlx_ft.train.job import Judge, Judgement

FOLDER = "selection"
MOST_NAMED = 5
# With fewer, the 95 % interval of a score of 0.8 is wider than 0.55 to 0.93.
FEWEST_LEFT = 15


def chooser(select: SelectRecipe) -> Suite | None:
    """Return the suite that chooses, cut to its prompts, or None when no suite does.

    Prompts are taken from each category in turn, in the file's order. Raises DataError.
    """
    if not select.asks or select.suite is None:
        return None
    suite = load_suite(Path(select.suite))
    categories: dict[str, list[Sample]] = {}
    for sample in suite.samples:
        categories.setdefault(sample.category, []).append(sample)
    turns = zip_longest(*categories.values())
    taken = [sample for turn in turns for sample in turn if sample is not None][: select.limit]
    return replace(suite, samples=tuple(sample for sample in suite.samples if sample in taken))


def evaluated(suites: Sequence[Suite], paths: Sequence[str], choosing: Suite) -> tuple[Suite, ...]:
    """Return the suites of the evaluation (from `paths`) without the prompts that choose.

    Only the choosing suite's own file gives way; raises DataError when nothing of it is left, and
    for a prompt that another suite has in the same words.
    """
    asked = {_words(sample): sample for sample in choosing.samples}
    rest, faults = [], []
    for suite, path in zip(suites, paths, strict=True):
        if suite.file_sha256 == choosing.file_sha256:
            left = tuple(s for s in suite.samples if _words(s) not in asked)
            if not left:
                found = f"all of its {len(suite.samples)} prompts choose the checkpoint"
                fix = "lower train.select.limit, or choose with a suite of its own"
                faults.append(Fault(f"{path} (train.select.suite)", found, fix))
            suite = replace(suite, samples=left)
        both = [(s, asked[_words(s)]) for s in suite.samples if _words(s) in asked]
        faults += [
            Fault(
                f"{path}, sample {sample.id}",
                f"train.select.suite asks the same as sample {other.id}, so the checkpoint would "
                "be chosen by what it is measured with",
                "take it out of one of the two",
            )
            for sample, other in both[:MOST_NAMED]
        ]
        rest.append(suite)
    if faults:
        raise DataError(faults)
    return tuple(rest)


def selection_finding(choosing: Suite, suites: Sequence[Suite]) -> Finding:
    """Return whether what chooses leaves enough of its own suite to measure with."""
    from mlx_ft.preflight import Finding

    measured = f"{len(choosing.samples)} prompts of {choosing.name} choose the weights"
    same = [suite for suite in suites if suite.file_sha256 == choosing.file_sha256]
    left = sum(len(suite.samples) for suite in same)
    limit = f"at least {FEWEST_LEFT} of a suite are left to measure with"
    if same:
        measured += f", {left} are left for the evaluation"
    if not same or left >= FEWEST_LEFT:
        return Finding("selection", "ok", measured, limit, "")
    fix = "choose with a suite of its own, or lower train.select.limit"
    return Finding("selection", "warn", measured, limit, fix)


def _words(sample: Sample) -> str:
    """Return what the user says, as words alone."""
    said = [str(m.get("content") or "") for m in sample.messages if m["role"] == "user"]
    return " ".join(words_of(" ".join(said)))


def judge(recipe: Recipe, loaded: LoadedModel, folder: Path) -> Judge | None:
    """Return who asks the model in training, or None when the recipe wants nobody to.

    Answers are kept as `folder/selection/<suite>/<iteration>.jsonl`. Always all prompts together:
    the same weights then give the same answers, whatever was interrupted.
    """
    suite = chooser(recipe.train.select)
    if suite is None:
        return None
    from mlx_ft.columns import loaded_column
    from mlx_ft.evaluate.harness import evaluate_column, questions_of
    from mlx_ft.train.job import Judge

    def ask(iteration: int, alive: Callable[[], None]) -> Judgement:
        column = f"{iteration:07d}"
        (folder / FOLDER / suite.name / f"{column}.jsonl").unlink(missing_ok=True)
        sha256, batch_size = hash_of([str(folder), iteration]), recipe.eval.batch_size
        (result,) = evaluate_column(
            [suite],
            loaded_column(column, loaded, sha256, batch_size=batch_size),
            folder / FOLDER,
            progress=lambda done, of, what: alive(),
        )
        return _judgement(suite, recipe.train.select, dict(result.summary))

    prompts = [question.ids or () for question in questions_of(suite, loaded.renderer)]
    return Judge(ask, sum(map(len, prompts)) + suite.max_tokens * len(prompts))


def _judgement(suite: Suite, select: SelectRecipe, summary: dict[str, float]) -> Judgement:
    from mlx_ft.train.job import Judgement

    n = len(suite.samples)
    if select.by == "mean":
        return Judgement(suite.name, summary["mean"], n, summary["low"], summary["high"])
    share = summary["passed"] / n
    return Judgement(suite.name, share, n, *wilson_interval(share, n))
