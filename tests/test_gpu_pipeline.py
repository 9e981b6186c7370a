"""The whole job in a GPU's way: every base type comes home, and so does every GPU error."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_ft.engine.device import AS_GPU
from mlx_ft.runs.document import run_document
from mlx_ft.system.files import read_json_lines
from mlx_ft.system.gpu_errors import known_cause
from tests.support.gpu import BASE_TYPES
from tests.support.jobs import write_place
from tests.support.models import TINY_CONFIGS, stored_arrays, write_stored_model
from tests.support.slow import fast_first

EPOCHS = "train.epochs=40"
# Imported at the start of every process: the nth call of a function fails once, as MLX words it.
PLANTED = """
import importlib.abc, importlib.util, os, sys

WHERE, NAME, NUMBER, WORDS, COUNT = {where!r}, {name!r}, {number}, {words!r}, {count!r}

class Planting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != WHERE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            *owner, last = NAME.split(".")
            holder = getattr(module, owner[0]) if owner else module
            whole = getattr(holder, last)
            def failing(*arguments, **named):
                with open(COUNT, "a") as calls:
                    calls.write(".")
                if os.path.getsize(COUNT) == NUMBER:
                    raise RuntimeError(WORDS)
                return whole(*arguments, **named)
            setattr(holder, last, failing)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Planting())
"""
BUFFER = "[METAL] Command buffer execution failed: "
ERRORS = {
    "hang": BUFFER + "Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)",
    "victim": BUFFER + "Innocent Victim (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)",
    "ignored": BUFFER + "Ignored (for causing prior/excessive GPU errors)",
    "internal": BUFFER + "Internal Error (0000000e:Internal Error)",
    "out of memory": BUFFER + "Insufficient Memory (00000008:kIOGPUCommandBufferCallback",
    "allocation": "[metal::malloc] Attempting to allocate 20000000000 bytes which is greater than",
    "resources": "[metal::malloc] Resource limit (499000) exceeded.",
    "event": "[Event::Event] Failed to create Metal shared event.",
}
# Stage -> a function that it calls again and again.
PLACES = {
    "train": ("mlx_ft.train.accumulation", "GradientWindow.update"),
    "export": ("mlx_ft.export.write_weights", "packed_names"),
    "eval": ("mlx_ft.engine.generate", "generate"),
}
MOMENTS = ("middle", "early", "late")


def run_in(place: Path, as_gpu: bool, planted: Path | None = None) -> str:
    """Run the recipe of a place in a process of its own and return what it said."""
    paths = [str(planted)] if planted is not None else []
    done = subprocess.run(
        [sys.executable, "-m", "mlx_ft", "run", "r.yaml", "--set", EPOCHS],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            AS_GPU: "1" if as_gpu else "0",
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def write_gpu_place(folder: Path, base_type: str) -> Path:
    """Write a place whose model is of a base type."""
    folder.mkdir(parents=True, exist_ok=True)
    write_place(folder)
    for file in (folder / "model").iterdir():
        file.unlink()
    (folder / "model").rmdir()
    write_stored_model(folder / "model", TINY_CONFIGS["llama"], *BASE_TYPES[base_type])
    return folder


@pytest.mark.parametrize("base_type", fast_first(BASE_TYPES))
def test_every_base_type_goes_through_every_stage(tmp_path: Path, base_type: str) -> None:
    place = write_gpu_place(tmp_path, base_type)
    said = run_in(place, as_gpu=True)
    assert "WARNING" not in said
    folder = folder_of(place)
    document = run_document(folder)
    assert document["status"] == "done" and document["warnings"] == []
    info = document["train"]["info"]
    assert "as stored" in info["compute"]
    forward = info["forward"]
    assert (forward["name"], forward["packs"], forward["skips"]) == ("split", True, True)
    assert forward["relative_difference"] <= forward["tolerance"]
    assert all(check["ok"] for check in document["export"]["checks"])
    assert set(document["eval"]["small"]) == {"base", "adapter", "fused", "quantized"}
    assert info["final_validation_loss"] < info["first_validation_loss"]


def folder_of(place: Path) -> Path:
    """Return the only run folder of a place."""
    (folder,) = place.glob("runs/*")
    return folder


def plant(folder: Path, stage: str, number: int, words: str = "") -> Path:
    """Write the module that makes the nth call of a stage's function fail; return its folder."""
    folder.mkdir()
    where, name = PLACES[stage]
    count = str(folder / "calls")
    text = PLANTED.format(where=where, name=name, number=number, words=words, count=count)
    (folder / "sitecustomize.py").write_text(text)
    return folder


@dataclass(frozen=True)
class Untouched:
    """Runs without a fault, by type, and how often each stage's function is called there."""

    places: dict[str, Path]
    calls: dict[tuple[str, str], int]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Untouched:
    """The same run in float32 on the CPU, and in a GPU's way."""
    return Untouched(
        {base: tmp_path_factory.mktemp(base) / "place" for base in ("bfloat16", "float32")}, {}
    )


def run_untouched(untouched: Untouched, base: str, stage: str) -> int:
    """Make the run without a fault where it is not there yet; return the calls of a stage."""
    place = untouched.places[base]
    if (base, stage) not in untouched.calls:
        # Each stage counts in a run of its own, of which the last stays.
        if place.exists():
            place = place.with_name(stage)
        write_gpu_place(place, "bfloat16")
        planted = plant(place.with_name(f"counting-{stage}"), stage, 10**9)
        run_in(place, base == "bfloat16", planted)
        untouched.calls[base, stage] = (planted / "calls").stat().st_size
    return untouched.calls[base, stage]


def exported(place: Path) -> dict[str, dict[str, mx.array]]:
    """Return the arrays of all models that a run leaves."""
    folder = folder_of(place)
    files = {
        "adapter": folder / "train" / "adapter" / "adapters.safetensors",
        "fused": folder / "export" / "fused-f16" / "model.safetensors",
        "quantized": folder / "export" / "q5" / "model.safetensors",
    }
    return {name: stored_arrays(file) for name, file in files.items()}


def answers_of(place: Path) -> dict[str, list[str]]:
    """Return what each model answered."""
    folder = folder_of(place) / "eval" / "small"
    return {
        file.stem: [row["text"] for row in read_json_lines(file)]
        for file in sorted(folder.glob("*.jsonl"))
    }


def assert_the_same(one: Path, other: Path) -> None:
    """In every bit of every model, and in every answer."""
    found, expected = exported(one), exported(other)
    for model, arrays in expected.items():
        assert found[model].keys() == arrays.keys()
        for name, array in arrays.items():
            assert mx.array_equal(found[model][name], array).item(), f"{model}: {name}"
    assert answers_of(one) == answers_of(other) != {}


@pytest.mark.parametrize("base", fast_first(["bfloat16", "float32"]))
@pytest.mark.parametrize(
    "words",
    ["hang", *(pytest.param(each, marks=pytest.mark.stress) for each in ERRORS if each != "hang")],
)
@pytest.mark.parametrize("moment", fast_first(MOMENTS))
@pytest.mark.parametrize("stage", fast_first(PLACES))
def test_a_gpu_error_costs_only_time(
    tmp_path: Path, untouched: Untouched, base: str, stage: str, moment: str, words: str
) -> None:
    """At any moment the run comes home with what it would have had, in 16 bits too: here MLX adds
    up in the same order each time.
    """
    calls = run_untouched(untouched, base, stage)
    number = {"middle": max(2, calls // 2), "early": 1, "late": calls}[moment]
    place = write_gpu_place(tmp_path / "place", "bfloat16")
    planted = plant(tmp_path / "planted", stage, number, ERRORS[words])
    said = run_in(place, base == "bfloat16", planted)
    assert (planted / "calls").stat().st_size > number, "it failed, and went on"
    cause = known_cause(ERRORS[words])
    assert cause is not None and cause.words in said
    assert run_document(folder_of(place))["status"] == "done"
    assert_the_same(place, untouched.places[base])
