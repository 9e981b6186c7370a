"""Run lm-evaluation-harness tasks on our models, with the chat template on.

Does not: know any task, or bring data: the library fetches what its tasks need.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from mlx_ft.errors import DataError, Fault, InputError, MlxFtError, RunError
from mlx_ft.evaluate.chat_fingerprint import compare_template
from mlx_ft.evaluate.local_model import open_loaded
from mlx_ft.evaluate.targets import Target
from mlx_ft.recipe.cli_defaults import DEFAULT_BATCH_SIZE
from mlx_ft.system.console import Console
from mlx_ft.system.files import hash_of, read_json, write_json

SCHEMA = 1
INSTALL = "pip install 'mlx-ft[lm-eval]'"


@dataclass(frozen=True)
class Tasks:
    """The tasks to ask, and how.

    include: folder of further task files.
    num_fewshot: worked examples before each task.
    limit: samples of each task.
    """

    names: tuple[str, ...]
    include: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = DEFAULT_BATCH_SIZE


def require_lm_eval() -> str:
    """Return the version of lm-evaluation-harness; RunError when it is not installed."""
    if util.find_spec("lm_eval") is None:
        raise RunError(Fault("--tasks", "lm-evaluation-harness is not installed", INSTALL))
    return metadata.version("lm_eval")


def run_tasks(
    tasks: Tasks,
    targets: Sequence[Target],
    folder: Path,
    console: Console,
    *,
    allow_template_mismatch: bool = False,
) -> dict[str, Any]:
    """Ask each target the tasks into `folder/lm_eval/<column>.json`; return results by column.

    A column whose file is there, of the same weights, tasks and version, is not asked again. Raises
    RunError without the library, DataError for tasks that cannot be asked this way, ModelError for
    a chat format other than that of the training.
    """
    version = require_lm_eval()
    results: dict[str, Any] = {}
    for target in targets:
        column = target.column(tasks.batch_size)
        check = compare_template(column, allow_mismatch=allow_template_mismatch)
        asked = [SCHEMA, version, target.sha256, vars(tasks) | {"include": str(tasks.include)}]
        key = hash_of([*asked, column.renderer and column.renderer.fingerprint()])
        path = folder / "lm_eval" / f"{target.name}.json"
        found = _kept(path, key)
        if found is None:
            found = {"schema": SCHEMA, "key": key, "lm_eval": version, "template": check.state}
            found |= {"warnings": list(check.warnings), **_ask(tasks, target, console)}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
        for warning in check.warnings:
            console.say(f"warning: {warning}", "yellow")
        results[target.name] = found
    return results


def _kept(path: Path, key: str) -> dict[str, Any] | None:
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("key") == key else None


def _ask(tasks: Tasks, target: Target, console: Console) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from mlx_ft.evaluate.lm_eval_model import ChatModel

    include_path = None if tasks.include is None else str(tasks.include)
    with (
        console.progress(f"lm-eval, {target.name}", 1.0) as line,
        open_loaded(target.source) as loaded,
    ):
        model = ChatModel(loaded, tasks.batch_size, line)
        del loaded
        try:
            found = simple_evaluate(
                model=model,
                tasks=list(tasks.names),
                num_fewshot=tasks.num_fewshot,
                limit=tasks.limit,
                task_manager=TaskManager(include_path=include_path),
                apply_chat_template=True,
                fewshot_as_multiturn=True,
                bootstrap_iters=0,
            )
        except MlxFtError:
            raise
        except Exception as error:  # tasks are other people's code, and fetch data from anywhere
            fix = "see `lm-eval ls tasks` for names; a task's data must be reachable or cached"
            words = " ".join(str(error).split())[:300] or type(error).__name__
            raise DataError(Fault(f"lm-eval {', '.join(tasks.names)}", words, fix)) from error
        del model
    assert found is not None, "only other ranks are given nothing"
    kept = {name: found[name] for name in ("results", "versions", "n-samples", "higher_is_better")}
    plain: dict[str, Any] = json.loads(
        json.dumps(kept | {"samples": found.get("samples")}, default=str)
    )
    return plain


def task_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Return table rows (column, task, metric, value) of the results of `run_tasks`."""
    rows = []
    for column, found in results.items():
        for task, measured in found["results"].items():
            for name, value in measured.items():
                metric = name.removesuffix(",none")
                if isinstance(value, float | int) and "stderr" not in name and name != "sample_len":
                    rows.append([column, task, metric, f"{value:.3f}"])
    return rows


def require_models(server: object) -> None:
    """Raise InputError when a server is to be asked tasks."""
    if server is not None:
        found = "a server does not tell log-probabilities of given answers"
        raise InputError(Fault("--server with --tasks", found, "name a model on this disk"))
