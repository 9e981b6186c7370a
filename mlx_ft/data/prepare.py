"""Prepare the data: render, count and write both splits.

Does: stop with all faults at once, before anything is written.
Does not: write a manifest (`stage.py` seals the folder), or use test.jsonl.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ft.data.lint import LISTED_LINES, hits_json, lint
from mlx_ft.data.order import training_order
from mlx_ft.data.problems import Problem, raise_problems
from mlx_ft.data.render import RenderedSplit, render_split
from mlx_ft.data.rows import FileRows, LeftOut
from mlx_ft.data.sources import SPLITS, api_file, files_of, folder_of, read_splits, sha256_of
from mlx_ft.data.statistics import coverage, overlap, split_statistics
from mlx_ft.data.tokens import take_rows, write_split
from mlx_ft.data.tool_api import read_api
from mlx_ft.data.tool_calls import check_rows
from mlx_ft.errors import Fault, RunError
from mlx_ft.model.chat import ChatRenderer
from mlx_ft.recipe.schema import DataRecipe
from mlx_ft.system.console import Console, Progress
from mlx_ft.system.files import write_json
from mlx_ft.text.sparklines import sparkline


@dataclass(frozen=True)
class DataSummary:
    """The result of the data stage.

    splits: name -> rows, dropped_overlong, tokens and trained_tokens.
    fingerprint: of the renderer.
    """

    splits: Mapping[str, Mapping[str, int]]
    overlap_rows: int
    fingerprint: Mapping[str, Any]

    def info(self) -> dict[str, Any]:
        """Return the summary as plain JSON, for the stage's manifest."""
        return {
            "splits": {name: dict(counts) for name, counts in self.splits.items()},
            "overlap_rows": self.overlap_rows,
            "fingerprint": dict(self.fingerprint),
        }


def prepare_data(
    data: DataRecipe,
    renderer: ChatRenderer,
    out: Path,
    console: Console,
    progress: Progress,
    read: Mapping[str, FileRows] | None = None,
) -> DataSummary:
    """Write `<split>.safetensors` for both splits and `stats.json` into the folder `out`.

    progress: its total is 1, first for the rows, then again for the rules of the lint.
    read: the rows of both splits, where they have been read already.

    Raises DataError with the faults of both files, before anything is written, and RunError when
    the disk refuses.
    """
    for unused in files_of(folder_of(data), "test"):
        console.say(f"{unused}: not used, the recipe's suites are the test")
    read = read_splits(data) if read is None else read
    raise_problems(problem for file in read.values() for problem in file.problems)
    if (api := api_file(data)) is not None:
        raise_problems(_api_problems(read, api))
    rendered = _rendered(read, renderer, data, progress)
    raise_problems(
        problem
        for split in SPLITS
        for problem in _split_problems(split, read[split], rendered[split])
    )
    counted = {split: _counted(file, rendered[split], renderer) for split, file in read.items()}
    _say_what_happens(read, rendered, counted, data, console)
    shared = overlap(rendered["train"].tokens, rendered["valid"].tokens)
    stats = {
        "schema": 1,
        "max_seq_length": data.max_seq_length,
        "splits": counted,
        "coverage": coverage(rendered["train"].all_lengths, data.max_seq_length),
        **shared,
        "lint": hits_json(lint(rendered["train"].kept, data.lint_off, progress)),
    }
    for split, result in rendered.items():
        tokens = result.tokens
        if split == "train" and data.in_order:
            tokens = take_rows(tokens, training_order(result.kept, tokens.lengths.tolist(), data))
        write_split(out / f"{split}.safetensors", tokens)
    _write_statistics(out / "stats.json", stats)
    return _summary(stats, renderer)


def _counted(file: FileRows, split: RenderedSplit, renderer: ChatRenderer) -> dict[str, Any]:
    return split_statistics(split, renderer.stop_ids) | {
        "sources": [{"path": str(file.path), "sha256": sha256_of(file.path)}],
        "left_out": [
            {"why": gone.why, "count": len(gone.lines), "lines": gone.lines[:LISTED_LINES]}
            for gone in file.left_out
        ],
    }


def _rendered(
    read: Mapping[str, FileRows], renderer: ChatRenderer, data: DataRecipe, progress: Progress
) -> dict[str, RenderedSplit]:
    rendered, done = {}, 0
    total = max(1, sum(len(file.rows) for file in read.values()))
    for split, file in read.items():
        here = _RowProgress(progress, done, total)
        rendered[split] = render_split(file.path, file.rows, renderer, data, here)
        done += len(file.rows)
    return rendered


@dataclass(frozen=True)
class _RowProgress:
    """Progress of one split, shown as that of all rows.

    before: rows of earlier splits.
    total: rows of all splits.
    """

    progress: Progress
    before: int
    total: int

    def update(self, done: float, text: str = "") -> None:
        rows = self.before + int(done)
        self.progress.update(rows / self.total, f"{rows:,} of {self.total:,} tokenized")


def _write_statistics(path: Path, stats: Mapping[str, Any]) -> None:
    try:
        write_json(path, stats)
    except OSError as error:
        found = f"cannot be written ({error.strerror or error})"
        raise RunError(Fault(str(path), found, "free some space on that disk")) from error


def _api_problems(read: Mapping[str, FileRows], path: Path) -> Iterator[Problem]:
    api = read_api(path)
    for file in read.values():
        for fault in check_rows(file.rows, api):
            yield Problem(file.path, fault.line, "not in the API", fault.found, fault.fix)


def _split_problems(side: str, file: FileRows, split: RenderedSplit) -> list[Problem]:
    """Return why a split cannot be used: the refused rows, or that no row is left."""
    if split.problems or len(split.tokens):
        return list(split.problems)
    if not file.rows:
        found = "no row of it is held out" if side == "valid" else "every row of it is held out"
        return [Problem(file.path, None, "empty split", found, "change data.holdout or its seed")]
    found = f"all {len(file.rows):,} rows are longer than max_seq_length"
    fix = f"raise data.max_seq_length (the shortest row has {min(split.all_lengths):,} tokens)"
    return [Problem(file.path, None, "too long", found, fix)]


def _say_what_happens(
    read: Mapping[str, FileRows],
    rendered: Mapping[str, RenderedSplit],
    counted: Mapping[str, Mapping[str, Any]],
    data: DataRecipe,
    console: Console,
) -> None:
    for split in SPLITS:
        path, result = read[split].path, rendered[split]
        console.say(
            f"{path}: {len(result.tokens):,} rows, {len(result.tokens.ids):,} tokens, "
            f"{int(result.tokens.trained.sum()):,} of them trained"
        )
        lengths, bars = counted[split]["length_quantiles"], counted[split]["histogram"]["counts"]
        console.say(
            f"{path}: tokens a row, 0 {sparkline(bars)} {lengths['max']:,}; half have at most "
            f"{lengths['p50']:,}, 95 % at most {lengths['p95']:,}"
        )
        if result.tokens.weights is not None:
            weights = result.tokens.weights[result.tokens.trained != 0]
            console.say(
                f"{path}: trained tokens weigh {weights.min():g} to {weights.max():g} in the loss, "
                f"{weights.mean():.2f} on average"
            )
        too_long = LeftOut(f"longer than {data.max_seq_length:,} tokens", result.overlong_lines)
        for gone in (*read[split].left_out, too_long):
            if gone.lines:
                lines = ", ".join(str(line) for line in gone.lines[:10])
                more = ", ..." if len(gone.lines) > 10 else ""
                console.say(
                    f"{path}: left out {len(gone.lines):,} rows {gone.why} (line {lines}{more})"
                )
        if data.mask_prompt and any(row.form == "text" for row in result.kept):
            console.say(f"{path}: plain text has no prompt to mask, every token of it is trained")


def _summary(stats: Mapping[str, Any], renderer: ChatRenderer) -> DataSummary:
    names = ("rows", "dropped_overlong", "tokens", "trained_tokens")
    return DataSummary(
        splits={
            split: {name: counts[name] for name in names}
            for split, counts in stats["splits"].items()
        },
        overlap_rows=stats["overlap_rows"],
        fingerprint=renderer.fingerprint(),
    )
