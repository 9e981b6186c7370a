"""Training requests, processes that are killed at random moments, and what they learned."""

import os
import random
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from mlx_ft.data.tokens import write_split
from mlx_ft.recipe.schema import DataRecipe, LoraParameters, Recipe, TrainRecipe
from mlx_ft.system.files import read_json_lines
from mlx_ft.train.handoff import (
    TrainRequest,
)
from mlx_ft.train.sanity_check import Prompt
from mlx_ft.train.supervisor import (
    last_checkpoint,
)
from tests.support.trainings import random_rows

# What says how fast or when, not what was learned.
TIMES = ("seconds", "seconds_left", "tokens_per_second", "peak_memory_bytes")


def request_in(place: Path, base: Path, **changes: Any) -> TrainRequest:
    """Return the request of a tiny run below `place`, its rows written."""
    data, folder = place / "data", place / "train.tmp"
    data.mkdir(parents=True)
    folder.mkdir()
    write_split(data / "train.safetensors", random_rows(13, seed=1))
    write_split(data / "valid.safetensors", random_rows(5, seed=2))
    values = {"steps_per_report": 3, "steps_per_eval": 10, "save_every": 2, "iters": 30}
    lora = LoraParameters(rank=4, alpha=8.0, dropout=0.1)
    train = TrainRecipe(
        num_layers=2,
        learning_rate=1e-3,
        **(values | {"lora_parameters": lora} | changes),
    )
    return TrainRequest(
        recipe=Recipe(name="tiny", model="tiny", data=DataRecipe(path="."), train=train),
        model_folder=base,
        data_folder=data,
        folder=folder,
        inputs="inputs",
        model_identity="tiny",
        prefix_limit_bytes=1 << 20,
        prefix_folder=place / "prefix",
        sanity_prompts=[Prompt([{"role": "user", "content": "hello"}])],
    )


def arrays(file: Path) -> dict[str, bytes]:
    """Return the bits of each array; files of equal arrays may order them otherwise."""
    return {name: array.tobytes() for name, array in load_file(file).items()}


def learned(
    request: TrainRequest,
) -> tuple[dict[str, bytes], dict[str, bytes], list[dict[str, Any]]]:
    """Return adapter, last optimizer state and metrics of a finished training."""
    newest = request.folder / "checkpoints" / f"{last_checkpoint(request):07d}"
    metrics = read_json_lines(request.folder / "metrics.jsonl")
    return (
        arrays(request.folder / "adapter" / "adapters.safetensors"),
        arrays(newest / "optimizer.safetensors"),
        [{k: v for k, v in metric.items() if k not in TIMES} for metric in metrics],
    )


class Killer(threading.Thread):
    """Kills the training process of a run, a number of times, whenever it has got a bit further."""

    def __init__(self, request: TrainRequest, control: Path, kills: int, number: int) -> None:
        super().__init__(daemon=True)
        self.request, self.control, self.left, self.number = request, control, kills, number
        self.random = random.Random(kills)
        self.done = threading.Event()

    def wait_for_a_moment(self) -> None:
        time.sleep(self.random.uniform(0, 0.05))

    def run(self) -> None:
        while self.left and not self.done.is_set():
            before = last_checkpoint(self.request)
            while not self.done.is_set() and last_checkpoint(self.request) == before:
                time.sleep(0.01)
            self.wait_for_a_moment()
            for pid in children():
                self.strike(pid)
                self.left -= 1

    def strike(self, pid: int) -> None:
        os.kill(pid, self.number)


def children() -> list[int]:
    """Return the training processes that this process has started."""
    found = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "mlx_ft.train.process"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [int(pid) for pid in found.stdout.split()]


SUPERVISE = """
import sys
from pathlib import Path
from mlx_ft.system.console import Console
from mlx_ft.errors import MlxFtError
from mlx_ft.system.signals import interruptible
from mlx_ft.train.handoff import read_request
from mlx_ft.train.supervisor import supervise
place = Path(sys.argv[1])
try:
    with interruptible():
        supervise(read_request(place / "train.control"), place, Console())
except MlxFtError as error:
    print(error)
    sys.exit(error.exit_code)
"""
