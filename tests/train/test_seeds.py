"""Seeds that are trained on the same ground: each is, bit for bit, what it is alone."""

import io
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_ft.recipe.schema import LoraParameters
from mlx_ft.runs.folder import read_manifest
from mlx_ft.system.console import Console
from mlx_ft.train import selection, setup
from mlx_ft.train.handoff import TrainRequest, seed_folder
from mlx_ft.train.sanity_check import Prompt
from mlx_ft.train.session import train_one, train_seeds
from mlx_ft.train.supervisor import last_checkpoint, supervise
from tests.support.models import write_tiny_model
from tests.support.training_processes import TIMES, children, learned, request_in
from tests.support.trainings import quiet

SEEDS = (3, 0, 5)
PROMPTS = [Prompt([{"role": "user", "content": text}]) for text in ("hello", "fox", "Paris")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"), "llama", layers=3)


def family_in(place: Path, base: Path, **changes: Any) -> TrainRequest:
    """Return the request of three seeds below `place`."""
    request = request_in(place, base, **({"iters": 12, "seeds": list(SEEDS)} | changes))
    return replace(request, seeds=SEEDS, sanity_prompts=PROMPTS, sanity_required=False)


def result(request: TrainRequest) -> Any:
    """Return what a finished training learned and says."""
    return learned(request), (request.folder / "samples.jsonl").read_bytes()


def finished(family: TrainRequest, seed: int) -> TrainRequest:
    """Return the request of one seed where it lies once it is complete."""
    return replace(family.of_seed(seed), folder=family.folder / seed_folder(seed))


def timeless(info: Any) -> dict[str, Any]:
    return {key: value for key, value in info.items() if key not in TIMES}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fine_tune_type": "dora", "prefix_cache": "memory"},
        {"fine_tune_type": "full"},
        {"prefix_cache": "off"},
        {"grad_checkpoint": True},
        {"low_memory": True},
        {"lora_parameters": LoraParameters(rank=4, keys=["mlp.up_proj", "lm_head"])},
        {"lora_parameters": LoraParameters(rank=4, keys=["mlp.up_proj", "model.embed_tokens"])},
    ],
    ids=str,
)
def test_a_seed_among_others_is_what_it_is_alone(
    base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Weights, optimizer, metrics, answers and hand-over, whichever seed came before."""
    if "lora_parameters" in changes:  # a model whose head is one of its own
        base = write_tiny_model(tmp_path, "qwen3", layers=3)
    family = family_in(tmp_path / "family", base, **changes)
    train_seeds(family, quiet())
    for seed in SEEDS:
        place = tmp_path / f"alone-{seed}"
        alone = family_in(place, base, **changes).of_seed(seed)
        alone.folder.mkdir()
        info = train_one(alone, quiet())
        among = finished(family, seed)
        assert result(among) == result(alone)
        manifest = family.trained(seed)
        assert manifest is not None
        assert timeless(manifest.info) == {"seed": seed, **timeless(info)}


def test_what_seeds_have_in_common_is_done_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading, the proof of the split, and the loss of weights that nobody has trained yet."""
    counts = dict.fromkeys(("load_model", "choose_forward", "validation_loss"), 0)

    def counted(place: Any, name: str) -> None:
        plain = getattr(place, name)

        def counting(*arguments: Any, **named: Any) -> Any:
            counts[name] += 1
            return plain(*arguments, **named)

        monkeypatch.setattr(place, name, counting)

    counted(setup, "load_model")
    counted(setup, "choose_forward")
    counted(selection, "validation_loss")
    train_seeds(family_in(tmp_path, base), quiet())
    measured = 2 * len(SEEDS)  # after iterations 10 and 12
    assert counts == {"load_model": 1, "choose_forward": 1, "validation_loss": 1 + measured}


@pytest.mark.slow
def test_a_seed_that_is_stopped_leaves_the_next_one_as_it_would_be(
    base: Path, tmp_path: Path
) -> None:
    """What a random model says loops, so that every seed is stopped when answers are judged."""
    judged = replace(family_in(tmp_path / "judged", base), sanity_required=True)
    free = family_in(tmp_path / "free", base)
    for family in (judged, free):
        train_seeds(family, quiet())
    for seed in SEEDS:
        manifests = [family.trained(seed) for family in (judged, free)]
        assert [manifest is not None and "stopped" in manifest.info for manifest in manifests] == [
            True,
            False,
        ]
        assert result(finished(judged, seed)) == result(finished(free, seed))


@pytest.mark.slow
def test_processes_that_are_to_end_now_and_then_end_with_a_seed(base: Path, tmp_path: Path) -> None:
    """What the steps of three seeds leave behind in a process is not to come together."""
    segments, whole = (
        family_in(tmp_path / str(steps), base, segment_steps=steps) for steps in (8, None)
    )
    said = io.StringIO()
    supervise(segments, tmp_path / "8", Console(said))
    assert said.getvalue().count("computing in") == 2 * len(SEEDS)
    train_seeds(whole, quiet())
    for seed in SEEDS:
        assert learned(finished(segments, seed)) == learned(finished(whole, seed))


class _Killer(threading.Thread):
    """Kills the training process once, while the second seed is trained."""

    def __init__(self, family: TrainRequest) -> None:
        super().__init__(daemon=True)
        self.family = family
        self.first: Any = None

    def run(self) -> None:
        second = self.family.of_seed(SEEDS[1])
        while last_checkpoint(second) == 0:
            time.sleep(0.01)
        self.first = self.family.folder / seed_folder(SEEDS[0]) / "manifest.json"
        self.written = self.first.stat().st_mtime_ns
        for pid in children():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_kill_costs_no_seed_that_is_finished(base: Path, tmp_path: Path) -> None:
    undisturbed, killed = (family_in(tmp_path / name, base, iters=30) for name in ("one", "other"))
    train_seeds(undisturbed, quiet())
    said = io.StringIO()
    killer = _Killer(killed)
    killer.start()
    supervise(killed, tmp_path / "other", Console(said))
    killer.join()
    assert said.getvalue().count("the training process died") == 1
    assert f"seed {SEEDS[0]}" in said.getvalue()
    assert said.getvalue().count(f"seed {SEEDS[0]} (1 of 3) begins") == 1
    assert killer.first.stat().st_mtime_ns == killer.written
    for seed in SEEDS:
        assert result(finished(killed, seed)) == result(finished(undisturbed, seed))
        assert read_manifest(finished(killed, seed).folder) is not None
