"""metrics.jsonl of a run that may still be going, and its last answers.

Does: find the folder that the training, or the current one of several seeds, measures into.
Does not: interpret or write.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ft.system.files import read_json_lines

OF_A_SEED = re.compile(r"seed-(?P<seed>\d+)(?P<unfinished>\.tmp)?")


@dataclass(frozen=True)
class MetricsPlace:
    """Where a training writes metrics.jsonl.

    folder: relative to the run folder.
    seed: with several seeds and none chosen yet, the unfinished one, else the last finished one.
    None: the training has one seed, or one was chosen.
    finished: that seed is finished.
    complete: number of finished seeds.
    """

    folder: str
    seed: int | None = None
    finished: bool = False
    complete: int = 0


def metrics_place(run: Path, names: Sequence[str] = ("train", "train.tmp")) -> MetricsPlace | None:
    """Return where a run's training measures into, or None before its start.

    names: folders of the stage; the first existing one counts.
    """
    folders = [name for name in names if (run / name).is_dir()]
    if not folders:
        return None
    seeds = _seeds(run / folders[0])
    measured = [each for each in seeds if each.measured is not None]
    if (run / folders[0] / "metrics.jsonl").is_file() or not measured:
        return MetricsPlace(folders[0])
    last = max(measured, key=lambda each: (not each.finished, each.measured))
    complete = sum(each.finished for each in seeds)
    return MetricsPlace(f"{folders[0]}/{last.name}", last.seed, last.finished, complete)


@dataclass(frozen=True)
class _Seed:
    """The folder of one seed. measured: time of its last measurement (seconds since 1970)."""

    name: str
    seed: int
    finished: bool
    measured: float | None


def _seeds(folder: Path) -> list[_Seed]:
    found = []
    for path in folder.glob("seed-*"):
        parts = OF_A_SEED.fullmatch(path.name)
        if parts is None:
            continue
        try:
            measured = (path / "metrics.jsonl").stat().st_mtime
        except OSError:  # not begun, or it takes its final name in this instant
            measured = None
        found.append(_Seed(path.name, int(parts["seed"]), parts["unfinished"] is None, measured))
    return found


class Metrics:
    """metrics.jsonl of a run, read again after each change.

    A resumed run rewrites it from the lines up to its checkpoint.
    lines: the lines as last read.
    seed: the seed in training. None: the training has one seed, or the best one is chosen.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._seen: tuple[Path, int, int] | None = None
        self.lines: list[dict[str, Any]] = []
        self.seed: int | None = None

    def refresh(self) -> list[dict[str, Any]]:
        """Return the lines as they are now."""
        place = metrics_place(self._run, ("train.tmp", "train"))
        if place is None:
            return self.lines
        path = self._run / place.folder / "metrics.jsonl"
        try:
            stat = path.stat()
            if self._seen != (path, stat.st_mtime_ns, stat.st_size):
                self.lines, self.seed = read_json_lines(path), place.seed
                self._seen = (path, stat.st_mtime_ns, stat.st_size)
        except OSError:  # a stage takes its final name in this instant
            pass
        return self.lines


def last_answers(run: Path) -> list[dict[str, Any]]:
    """Return the answers in the sample log that was written to last, none when there is none."""
    logs = [
        *run.glob("train*/samples.jsonl"),
        *run.glob("eval*/*/*.jsonl"),
    ]
    times = {log: log.stat().st_mtime for log in logs if log.is_file()}
    return read_json_lines(max(times, key=lambda log: times[log])) if times else []
