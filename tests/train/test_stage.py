"""Several seeds: each complete or to go on, the best of them exported, and all of them counted."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.errors import GateFailed, InputError, Interrupted
from mlx_ft.evaluate.stats import wilson_interval
from mlx_ft.inputs import OpenRun
from mlx_ft.job import Job
from mlx_ft.pipeline import run_pipeline
from mlx_ft.recipe.schema import DataRecipe, Recipe, SelectRecipe, TrainRecipe
from mlx_ft.runs.folder import read_manifest
from mlx_ft.system.files import read_json, read_json_lines
from mlx_ft.train import supervisor
from mlx_ft.train.stage import seeds_info
from tests.support.jobs import open_run_of, write_place
from tests.support.suites import write_suite

SETS = (
    "train.seeds=[0, 1, 2]",
    "train.epochs=null",
    "train.iters=12",
    "train.steps_per_eval=6",
    "train.steps_per_report=6",
    "train.num_layers=1",
    "train.lora_parameters.rank=2",
    "train.select.suite=choose.yaml",
    "train.select.metric=passed",
)


def open_run_in(place: Path, *sets: str) -> OpenRun:
    """Return an open run whose answers are not judged: those of a random model loop."""
    opened = open_run_of(place, *sets)
    return replace(opened, job=replace(opened.job, judged=False))


def job_in(place: Path, *sets: str) -> Job:
    return open_run_in(place, *sets).job


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A place where three seeds were trained, and how often frozen layers were computed."""
    place = tmp_path_factory.mktemp("seeds")
    with pytest.MonkeyPatch.context() as patch:
        write_place(place)
        write_suite(place, "choose", [("talk", f"lazy fox {number}") for number in range(4)])
        patch.chdir(place)
        patch.setenv("MLX_FT_HOME", str(place / "cache"))
        opened = open_run_in(place, *SETS)
        job = opened.job
        run_pipeline(opened, "train")
        yield place, job


def test_each_seed_is_a_whole_training_and_the_best_one_is_handed_on(trained: Any) -> None:
    _, job = trained
    manifest = read_manifest(job.folder / "train")
    assert manifest is not None
    info = manifest.info
    folders = {seed: job.folder / "train" / f"seed-{seed}" for seed in (0, 1, 2)}
    manifests = {seed: read_manifest(folder) for seed, folder in folders.items()}
    assert all(manifests.values())
    entries = {entry["seed"]: entry for entry in info["seeds"]["trained"]}
    for seed, entry in entries.items():
        lines = read_json_lines(folders[seed] / "metrics.jsonl")
        scores = {m["iteration"]: m["score"] for m in lines if m["kind"] == "selection"}
        assert set(scores) == {6, 12} and entry["score"] == max(scores.values())
        answers = folders[seed] / "selection" / "choose"
        assert len(read_json_lines(answers / "0000006.jsonl")) == 4
    best = max(entries.values(), key=lambda e: (e["score"], -e["validation_loss"]))["seed"]
    assert info["seeds"]["chosen"] == info["seed"] == best
    for name in ("adapter/adapters.safetensors", "metrics.jsonl", "samples.jsonl"):
        assert (job.folder / "train" / name).read_bytes() == (folders[best] / name).read_bytes()
    weights = [(f / "adapter" / "adapters.safetensors").read_bytes() for f in folders.values()]
    assert len(set(weights)) == 3, "each seed learns something else"


@pytest.mark.slow
def test_all_seeds_share_the_outputs_of_frozen_layers(trained: Any) -> None:
    """One file for the training rows and one for those that validate."""
    place, job = trained
    assert len(list((place / "cache" / "prefix").iterdir())) == 2
    assert not list(job.folder.glob("train/seed-*/data"))


def test_a_check_refuses_to_choose_by_what_measures(trained: Any) -> None:
    """The evaluation's suite has three prompts, all of which would choose."""
    place, job = trained
    with pytest.raises(InputError, match="all of its 3 prompts choose the checkpoint"):
        job_in(place, *SETS, "train.select.suite=suite.yaml")
    opened = open_run_in(place, *SETS, "train.select.suite=suite.yaml", "train.select.limit=1")
    assert opened.choosing is not None and len(opened.suites[0].samples) == 2
    findings = read_json(job.folder / "preflight.json")["findings"]
    assert [f["level"] for f in findings if f["check"] == "selection"] == ["ok"]


@pytest.mark.slow
def test_a_seed_is_what_it_is_alone(trained: Any) -> None:
    place, job = trained
    opened = open_run_in(place, *SETS[1:], "train.seed=1")
    alone = opened.job
    run_pipeline(opened, "train")
    one, other = job.folder / "train" / "seed-1", alone.folder / "train"
    adapter = "adapter/adapters.safetensors"
    assert (one / adapter).read_bytes() == (other / adapter).read_bytes()


def test_a_run_that_differs_later_on_takes_the_training_over(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, job = trained
    monkeypatch.setattr(supervisor, "supervise", lambda *_: pytest.fail("trained again"))
    opened = open_run_in(place, *SETS, "export.q_bits=8")
    other = opened.job
    run_pipeline(opened, "train")
    assert other.folder != job.folder
    assert read_manifest(other.folder / "train") == read_manifest(job.folder / "train")
    record = read_json(other.folder / "run.json")["stages"]
    assert record["train"]["reused"] and record["data"]["reused"]
    assert not read_json(job.folder / "run.json")["stages"]["train"]["reused"]


@pytest.mark.slow
def test_seeds_that_are_finished_are_not_trained_again(
    trained: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """After an interruption while the second was trained: the first stays, the others are made."""
    place, job = trained
    sets = (*SETS, "train.steps_per_report=3")
    opened = open_run_in(place, *sets)
    stopped = opened.job
    interrupt_when(stopped.folder / "train.tmp" / "seed-1.tmp" / "metrics.jsonl", signal.SIGTERM)
    with pytest.raises(Interrupted, match="checkpoint written"):
        run_pipeline(opened, "train")
    first = stopped.folder / "train.tmp" / "seed-0" / "manifest.json"
    before = first.read_bytes()
    capfd.readouterr()
    run_pipeline(open_run_in(place, *sets), "train")
    said = capfd.readouterr().err
    assert "seed 0 is trained already" in said and "seed 0 (1 of 3) begins" not in said
    assert "seed 1 (2 of 3) begins" in said and "seed 2 (3 of 3) begins" in said
    assert (stopped.folder / "train" / "seed-0" / "manifest.json").read_bytes() == before
    for seed in (0, 1, 2):
        adapter = f"train/seed-{seed}/adapter/adapters.safetensors"
        assert (stopped.folder / adapter).read_bytes() == (job.folder / adapter).read_bytes()
    shutil.rmtree(stopped.folder)


def interrupt_when(metrics: Path, number: signal.Signals) -> threading.Thread:
    """Send a signal to the training process, once, when there is a file of metrics."""

    def strike() -> None:
        while not read_json_lines(metrics):
            time.sleep(0.01)
        for pid in training_processes():
            os.kill(pid, number)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_killed_training_chooses_as_one_that_was_not(trained: Any) -> None:
    """With a real signal, right after a comparison; its process asks and scores by itself."""
    place, job = trained
    sets = (*SETS[1:], "train.seed=2", "train.save_every=2", "train.iters=12")
    opened = open_run_in(place, *sets)
    alone = opened.job
    killed: list[int] = []

    def kill() -> None:
        metrics = alone.folder / "train.tmp" / "metrics.jsonl"
        while not killed:
            if any(line["kind"] == "selection" for line in read_json_lines(metrics)):
                for pid in training_processes():
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run_pipeline(opened, "train")
    killer.join()
    one, other = job.folder / "train" / "seed-2", alone.folder / "train"
    adapter = "adapter/adapters.safetensors"
    assert (one / adapter).read_bytes() == (other / adapter).read_bytes()
    scores = [
        [line for line in read_json_lines(folder / "metrics.jsonl") if line["kind"] == "selection"]
        for folder in (one, other)
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 2


def training_processes() -> list[int]:
    """Return the training processes that this process has started."""
    command = ["pgrep", "-P", str(os.getpid()), "-f", "mlx_ft.train.process"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.slow
def test_when_a_gate_stops_every_seed_the_run_is_stopped(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What such a model says loops, whatever the seed; asked again, nothing is trained again."""
    place, _ = trained
    sets = ("train.seeds=[1, 2]", *SETS[1:])
    with pytest.raises(GateFailed, match="look before you merge") as caught:
        run_pipeline(open_run_of(place, *sets), "train")
    monkeypatch.setattr(supervisor, "supervise", lambda *_: pytest.fail("trained again"))
    with pytest.raises(GateFailed) as again:
        run_pipeline(open_run_of(place, *sets), "train")
    assert again.value.faults == caught.value.faults


RECIPE = Recipe(
    name="r",
    model="m",
    data=DataRecipe(path="."),
    train=TrainRecipe(seeds=[0, 1], select=SelectRecipe(suite="s.yaml", gate=0.5)),
)
INFOS = st.lists(
    st.none() | st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0.1, 3.0)),
    min_size=1,
    max_size=8,
)


@given(results=INFOS)
def test_the_probability_of_learning_the_task_counts_stopped_seeds(
    results: list[tuple[float, float] | None],
) -> None:
    infos: list[dict[str, Any]] = []
    for seed, result in enumerate(results):
        if result is None:
            fault = {"where": "look", "found": "it loops", "fix": "less"}
            infos.append({"seed": seed, "stopped": [fault]})
            continue
        score, loss = result
        infos.append(
            {
                "seed": seed,
                "chosen_score": score,
                "chosen_validation_loss": loss,
                "chosen_iteration": 1,
                "iterations": 2,
                "seconds": 1.0,
            }
        )
    trained = [info for info in infos if "stopped" not in info]
    if not trained:
        return
    info = seeds_info(infos, trained[0], RECIPE)
    good = sum(result is not None and result[0] >= 0.5 for result in results)
    low, high = wilson_interval(good / len(results), len(results))
    assert info["reached"] == {
        "gate": 0.5,
        "count": good,
        "of": len(results),
        "low": low,
        "high": high,
    }
    scores = [result[0] for result in results if result is not None]
    assert info["spread"]["low"] == min(scores) and info["spread"]["high"] == max(scores)
    json.dumps(info, allow_nan=False)


def test_a_manifest_of_seeds_is_plain_json(trained: Any) -> None:
    _, job = trained
    info = read_json(job.folder / "train" / "manifest.json")["info"]
    assert info["seeds"]["reached"]["of"] == 3 and info["seeds"]["spread"]["measure"] == "score"
