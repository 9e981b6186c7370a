"""Prompts that select checkpoints, kept out of the evaluation.

Does not: ask them (`train/judge.py`), or compare scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from mlx_ft.errors import DataError, Fault
from mlx_ft.evaluate.suites import Sample, Suite, load_suite
from mlx_ft.recipe.schema import SelectRecipe
from mlx_ft.text.near_duplicates import words_of

MOST_NAMED = 5


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


def _words(sample: Sample) -> str:
    """Return the user's messages as words alone."""
    said = [str(m.get("content") or "") for m in sample.messages if m["role"] == "user"]
    return " ".join(words_of(" ".join(said)))
