"""PreflightInput and Finding: the facts that checks are given, and their results.

Does: write findings as JSON; raise failed ones as one error.
Does not: check anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any, Literal

from mlx_ft.errors import Fault, RecipeError
from mlx_ft.recipe.schema import Recipe
from mlx_ft.system.hardware import Machine

SCHEMA = 1
SHOWN = 4
Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class OriginalFacts:
    """What the files say of the model that the adapter will be fused into: its config, its tensors'
    shapes beside those of the model that is trained (after dequantization), and in what words their
    tokenizers and templates differ.
    """

    config: Mapping[str, Any]
    trained_shapes: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    chat_differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreflightInput:
    """All that is known before training.

    `data_stats` is the data stage's stats.json, `model_config` the model's config.json,
    `model_bytes` the size of its safetensors, `free_disk_bytes` that of the disk under the runs.
    `contaminated` are prompts of the suites that training rows hold: name, line of the training
    file, and whether the whole prompt is there. `token_counts` are the texts that must be one token
    each, with the tokens that they are. `probed` says whether this model has been looked at.
    `start_shapes` are the tensors of the adapter file that training starts from, if it does.
    `rows_beyond_context` are the training rows longer than what the model was made for.
    """

    recipe: Recipe
    data_stats: Mapping[str, Any]
    model_config: Mapping[str, Any]
    model_bytes: int
    machine: Machine
    free_disk_bytes: int
    contaminated: tuple[tuple[str, int, bool], ...] = ()
    token_counts: tuple[tuple[str, int], ...] = ()
    probed: bool = False
    original: OriginalFacts | None = None
    start_shapes: Mapping[str, tuple[int, ...]] | None = None
    rows_beyond_context: int = 0

    @property
    def rows(self) -> int:
        """Training rows that were kept."""
        return int(self.train_stats["rows"])

    @property
    def train_stats(self) -> Mapping[str, Any]:
        stats: Mapping[str, Any] = self.data_stats["splits"]["train"]
        return stats

    @property
    def valid_stats(self) -> Mapping[str, Any]:
        stats: Mapping[str, Any] = self.data_stats["splits"]["valid"]
        return stats

    def file_name(self, split: str) -> str:
        """Return the name of the file that a split's rows are in; held-out rows are in train's."""
        (source, *_) = self.data_stats["splits"][split]["sources"]
        return PurePath(source["path"]).name


@dataclass(frozen=True)
class Finding:
    """One check's outcome, in words for people.

    fix: empty when all is well.
    """

    check: str
    level: Level
    measured: str
    limit: str
    fix: str


def some_of(values: Sequence[str] | Sequence[int]) -> str:
    """Return the first values in words, and how many more there are."""
    more = len(values) - SHOWN
    return ", ".join(map(str, values[:SHOWN])) + (f" and {more} more" if more > 0 else "")


def passes(check: str, measured: str, limit: str) -> Finding:
    """Return the finding of a check that has nothing to say against a run."""
    return Finding(check, "ok", measured, limit, "")


def accepted(finding: Finding, reasons: Mapping[Any, str]) -> Finding:
    """Return a failed finding as a warning, with the recipe's reason why it may fail, if any."""
    if finding.level != "fail" or finding.check not in reasons:
        return finding
    return replace(finding, level="warn", fix=f"accepted: {reasons[finding.check]}")


def findings_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the content of preflight.json."""
    return {"schema": SCHEMA, "findings": [asdict(finding) for finding in findings]}


def raise_on_fail(findings: Sequence[Finding]) -> None:
    """Raise one RecipeError with every failed check; findings that only warn pass."""
    faults = [
        Fault(f"check {finding.check}", f"{finding.measured} (limit: {finding.limit})", finding.fix)
        for finding in findings
        if finding.level == "fail"
    ]
    if faults:
        raise RecipeError(faults)
