"""wandb, trackio, tensorboard, mlflow and swanlab: one small adapter each.

Does: name the packages that a tracker needs; open or reopen its run; pass numbers on under the
names usual for trackers. Works without a network: data to send later is kept under the runs folder.
Does not: follow a training (`follow.py`), or run in the training process.
"""

from __future__ import annotations

import json
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mlx_ft.errors import Fault

# Line of metrics.jsonl -> key in it -> (name for trackers, factor).
NAMES: Mapping[str, Mapping[str, tuple[str, float]]] = {
    "train": {
        "loss": ("train/loss", 1),
        "learning_rate": ("train/learning_rate", 1),
        "gradient_norm": ("train/grad_norm", 1),
        "epoch": ("train/epoch", 1),
        "update": ("train/global_step", 1),
        "tokens_per_second": ("train/tokens_per_second", 1),
        "trained_tokens": ("train/trained_tokens", 1),
        "peak_memory_bytes": ("train/peak_memory_gb", 1e-9),
    },
    "validation": {"loss": ("eval/loss", 1)},
}


@dataclass(frozen=True)
class Session:
    """Everything that opens a tracker's run.

    project: name of the project.
    name: name of the run folder.
    store: folder for data that stays on this machine.
    config: the resolved recipe with dotted keys.
    memory: kept between sessions of the same run; empty the first time.
    """

    project: str
    name: str
    store: Path
    config: Mapping[str, Any]
    memory: dict[str, Any]

    @property
    def texts(self) -> dict[str, str]:
        """The configuration as texts, for trackers that take no lists."""
        return {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in self.config.items()
        }


class Tracker(Protocol):
    """An open run of a tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers of one iteration."""

    def finish(self, scores: Mapping[str, float], ok: bool) -> None:
        """Take the final scores and end the session."""


class _Wandb:
    def __init__(self, session: Session) -> None:
        import wandb

        given = os.environ.get("WANDB_MODE")
        known = "WANDB_API_KEY" in os.environ or _in_netrc("api.wandb.ai")
        self._run = wandb.init(
            project=session.project,
            name=session.name,
            id=session.name,
            resume="allow",
            dir=session.store,
            config=dict(session.config),
            mode=None if given or known else "offline",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                x_disable_stats=True,
                x_disable_meta=True,
            ),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, scores: Mapping[str, float], ok: bool) -> None:
        self._run.summary.update(dict(scores))
        self._run.finish(exit_code=0 if ok else 1)


class _SwanLab:
    def __init__(self, session: Session) -> None:
        import swanlab

        self._swanlab = swanlab
        known = "SWANLAB_API_KEY" in os.environ or Path("~/.swanlab/.netrc").expanduser().exists()
        given = os.environ.get("SWANLAB_MODE")
        mode = given or ("online" if known else "offline")
        swanlab.init(
            project=session.project,
            experiment_name=session.name,
            log_dir=str(session.store),
            config=dict(session.config),
            mode=mode,
            id=_letters(session.name),
            resume="allow",
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._swanlab.log(dict(values), step=step)

    def finish(self, scores: Mapping[str, float], ok: bool) -> None:
        if scores:
            self._swanlab.log(dict(scores))
        self._swanlab.finish(*(() if ok else ("crashed", "see the run's report.html")))


class _Trackio:
    def __init__(self, session: Session) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(session.store))
        import trackio

        self._trackio = trackio
        trackio.init(
            project=session.project,
            name=session.name,
            config=dict(session.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def finish(self, scores: Mapping[str, float], ok: bool) -> None:
        if scores:
            self._trackio.log(dict(scores))
        self._trackio.finish()


class _TensorBoard:
    def __init__(self, session: Session) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(logdir=str(session.store / session.name))
        rows = "".join(f"| {key} | {value} |\n" for key, value in session.texts.items())
        self._writer.add_text("recipe", f"| key | value |\n| --- | --- |\n{rows}", 0)
        self._step = 0

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._step = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, scores: Mapping[str, float], ok: bool) -> None:
        for name, value in scores.items():
            self._writer.add_scalar(name, value, self._step)
        self._writer.close()


class _MLflow:
    def __init__(self, session: Session) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        own = f"sqlite:///{session.store / 'mlflow.db'}"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or own)
        self._metric = Metric
        known = self._client.get_experiment_by_name(session.project)
        place = (session.store / "artifacts").as_uri()
        experiment = (
            known.experiment_id
            if known
            else self._client.create_experiment(session.project, artifact_location=place)
        )
        self._run = session.memory.get("run")
        if self._run is None:
            made = self._client.create_run(experiment, run_name=session.name)
            self._run = session.memory["run"] = made.info.run_id
            for key, value in session.texts.items():
                self._client.log_param(self._run, key, value[:500])

    def log(self, values: Mapping[str, float], step: int) -> None:
        metrics = [self._metric(name, value, 0, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def finish(self, scores: Mapping[str, float], ok: bool) -> None:
        self.log(scores, 0)
        self._client.set_terminated(self._run, "FINISHED" if ok else "FAILED")


@dataclass(frozen=True)
class Kind:
    """One tracker.

    package: to install.
    module: that the package brings.
    open: opens a run.
    look: command that shows its data ({store}, {project}).
    """

    package: str
    module: str
    open: Callable[[Session], Tracker]
    look: str


KINDS: Mapping[str, Kind] = {
    "trackio": Kind("trackio", "trackio", _Trackio, "TRACKIO_DIR={store} trackio show"),
    "wandb": Kind("wandb", "wandb", _Wandb, "wandb sync {store}/wandb/*, where it was offline"),
    "tensorboard": Kind(
        "tensorboardX tensorboard", "tensorboardX", _TensorBoard, "tensorboard --logdir {store}"
    ),
    "mlflow": Kind(
        "mlflow", "mlflow", _MLflow, "mlflow ui --backend-store-uri sqlite:///{store}/mlflow.db"
    ),
    "swanlab": Kind("swanlab", "swanlab", _SwanLab, "swanlab sync {store}/*, where it was offline"),
}


def missing_packages(names: Sequence[str]) -> list[Fault]:
    """Return a fault with the line to type for every tracker whose package is not installed."""
    return [
        Fault(
            "train.report_to",
            f"{name} needs a package that is not installed",
            f"pip install {KINDS[name].package}, or remove {name} from the list",
        )
        for name in names
        if find_spec(KINDS[name].module) is None
    ]


def values_of(metric: Mapping[str, Any], finite: Callable[[Any], bool]) -> dict[str, float]:
    """Return the values of a line of metrics.jsonl for trackers; empty for other kinds of line."""
    names = NAMES.get(str(metric.get("kind")), {})
    return {
        name: metric[key] * factor
        for key, (name, factor) in names.items()
        if finite(metric.get(key))
    }


def _in_netrc(machine: str) -> bool:
    try:
        return netrc.netrc().authenticators(machine) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _letters(name: str) -> str:
    """Return a name in the letters that an id may have."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)[:64]
