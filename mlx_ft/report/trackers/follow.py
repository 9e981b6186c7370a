"""The process that follows a run folder for one tracker, until its parent ends.

`python -m mlx_ft.report.trackers.follow TRACKER RUN STORE PROJECT`. The end of its stdin is the end
of the parent, planned or by a kill.
Does: send each measurement once, however often training processes restart. A later session of the
same run continues the tracker's own run.
Does not: print (a tracker's output is dropped), or fail loudly: `<run>/trackers/<name>.json` has
the error.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_ft.recipe.keys import flattened, setting
from mlx_ft.report.trackers.services import KINDS, Session, Tracker, values_of
from mlx_ft.runs.document import read_document
from mlx_ft.runs.metrics import Metrics
from mlx_ft.runs.reader import ArtifactReader
from mlx_ft.system.files import read_json, write_json
from mlx_ft.text.quantities import is_number
from mlx_ft.text.safe import one_line, without_secrets

POLL_SECONDS = 1.0
FOLDER = "trackers"


def memory_file(run: Path, name: str) -> Path:
    """Return the file of a tracker's progress in a run, and of its `error`, if any."""
    return run / FOLDER / f"{name}.json"


def read_memory(run: Path, name: str) -> dict[str, Any]:
    """Return the recorded progress of a tracker's sessions; empty at first."""
    try:
        value = read_json(memory_file(run, name))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def follow(name: str, run: Path, store: Path, project: str, over: threading.Event) -> None:
    """Send every measurement of a run to a tracker until `over`, then the scores."""
    store.mkdir(parents=True, exist_ok=True)
    memory = {**read_memory(run, name), "error": None}
    document = read_document(ArtifactReader(run))
    tracker = KINDS[name].open(Session(project, run.name, store, config_of(document), memory))
    metrics = Metrics(run)
    while True:
        last = over.wait(POLL_SECONDS)
        if _send(tracker, metrics.refresh(), memory):
            write_json(memory_file(run, name), memory)
        if last:
            break
    document = read_document(ArtifactReader(run))
    tracker.finish(scores_of(document), document["status"] in ("done", "stopped"))
    write_json(memory_file(run, name), memory)


def _send(tracker: Tracker, lines: list[dict[str, Any]], memory: dict[str, Any]) -> int:
    """Send new lines and return their number.

    Per kind of line, measurements that a resumed training repeats have an iteration that was sent
    already.
    """
    sent: dict[str, int] = memory.setdefault("sent", {})
    count = 0
    for line in lines:
        kind, iteration = str(line.get("kind")), line.get("iteration")
        values = values_of(line, is_number)
        if not values or not isinstance(iteration, int) or iteration <= sent.get(kind, -1):
            continue
        tracker.log(values, iteration)
        sent[kind] = iteration
        count += 1
    return count


def config_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resolved recipe with dotted keys, and the environment. Without secrets."""
    recipe = document["recipe"] or {"values": {}, "origins": {}}
    keys = flattened(recipe["values"], recipe["origins"])
    config = {key: setting(recipe["values"], key) for key in keys}
    model, place = document["model"] or {}, document["environment"] or {}
    told = {f"model.{key}": model.get(key) for key in ("revision", "model_type")}
    told |= {f"environment.{key}": place.get(key) for key in ("mlx_ft", "mlx", "device", "commit")}
    return {**config, **{key: value for key, value in told.items() if value is not None}}


def scores_of(document: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean score of every suite and column, and the final losses."""
    scores = {
        f"scores/{suite}/{column}": result["mean"]
        for suite, columns in (document["eval"] or {}).items()
        for column, result in columns.items()
        if is_number(result.get("mean"))
    }
    info = (document["train"] or {}).get("info") or {}
    losses = {"final/train_loss": "final_train_loss", "final/eval_loss": "final_validation_loss"}
    return {
        **scores,
        **{name: info[key] for name, key in losses.items() if is_number(info.get(key))},
    }


def main(name: str, run: Path, store: Path, project: str) -> int:
    """Follow a run. On any failure, write its reason for the parent."""
    over = threading.Event()

    def wait_for_the_parent() -> None:
        sys.stdin.buffer.read()
        over.set()

    threading.Thread(target=wait_for_the_parent, daemon=True).start()
    memory_file(run, name).parent.mkdir(exist_ok=True)
    try:
        follow(name, run, store, project, over)
    except Exception as error:  # whatever a tracker raises must only be told
        said = without_secrets(f"{type(error).__name__}: {error}", os.environ)
        memory = {**read_memory(run, name), "error": one_line(said, 300)}
        with contextlib.suppress(OSError):
            write_json(memory_file(run, name), memory)
        return 1
    return 0


if __name__ == "__main__":
    ended = main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    sys.stdout.flush()
    # Threads that a tracker left behind must not keep the process.
    os._exit(ended)
