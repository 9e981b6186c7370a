"""A sweep runs each member once, whatever was interrupted, and says all that is wrong before."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft import sweep
from mlx_ft.errors import Fault, GateFailed, RecipeError
from mlx_ft.inputs import OpenRun
from mlx_ft.pipeline import LAST, run_pipeline
from mlx_ft.recipe.load import load_recipe
from mlx_ft.recipe.write import yaml_text
from mlx_ft.runs.document import run_document
from mlx_ft.runs.lock import working
from mlx_ft.system.console import Console
from tests.support.jobs import open_run_of, write_place
from tests.support.recipes import MINIMAL

SMALL = (
    "train.epochs=null",
    "train.iters=4",
    "train.lora_parameters.rank=2",
    "eval.columns=[base]",
)


@given(
    axes=st.dictionaries(
        st.sampled_from(["train.seed", "train.batch_size", "data.limit"]),
        st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True),
        min_size=1,
    ),
    count=st.none() | st.integers(1, 70),
    seed=st.integers(0, 5),
)
def test_members_are_all_combinations_or_some_of_them_drawn(
    axes: dict[str, list[int]], count: int | None, seed: int
) -> None:
    grids = [f"{key}={','.join(map(str, values))}" for key, values in axes.items()]
    whole = sweep.grid_settings(grids)
    size = 1
    for values in axes.values():
        size *= len(values)
    assert len(set(whole)) == len(whole) == size
    for member in whole:
        assert [each.split("=")[0] for each in member] == list(axes)
        assert all(int(each.split("=")[1]) in axes[each.split("=")[0]] for each in member)
    drawn = sweep.grid_settings(grids, count, seed)
    assert drawn == sweep.grid_settings(grids, count, seed)
    assert len(drawn) == min(count or size, size) and [m for m in whole if m in drawn] == drawn


VALUES = st.recursive(
    st.integers(0, 9) | st.sampled_from(["a", "x,y", "it's", "1e-5", "[", "null", 'say "no"']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("kl"), inner),
    max_leaves=4,
)


@given(values=st.lists(VALUES, min_size=1, max_size=4))
def test_a_comma_inside_a_value_divides_nothing(values: list[Any]) -> None:
    texts = [yaml_text(value) for value in values]
    quoted = [text for text in texts if "'" not in text and "\\" not in text]
    if quoted:
        assert sweep.split_values(",".join(quoted)) == quoted


def test_all_that_is_wrong_with_a_grid_is_said_at_once() -> None:
    grids = ["train.seed", "train.iters=5,,6", "data.limit=1,1", "train.seed=0"]
    with pytest.raises(RecipeError) as caught:
        sweep.grid_settings(grids)
    said = str(caught.value)
    assert len(caught.value.faults) == 4 and "is given twice" in said and "a value twice" in said
    with pytest.raises(RecipeError, match="--grid: is missing"):
        sweep.grid_settings([])
    with pytest.raises(RecipeError, match="at most 1,000"):
        sweep.grid_settings([f"train.seed={','.join(map(str, range(1001)))}"])


def test_a_wrong_member_is_told_before_any_is_trained(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(MINIMAL)

    def open_with(sets: tuple[str, ...]) -> Any:
        return load_recipe(tmp_path / "r.yaml", sets)

    settings = sweep.grid_settings(["train.batch_size=1,none", "train.sed=1"])
    with pytest.raises(RecipeError) as caught:
        sweep.open_members(settings, open_with)
    told = [str(fault) for fault in caught.value.faults]
    assert any(line.startswith("train.batch_size=none, train.sed=1: --set") for line in told)
    assert sum("did you mean train.seed?" in line for line in told) == 2


def test_members_are_run_once_and_a_gate_stops_only_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "my place"
    place.mkdir()
    write_place(place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("MLX_FT_HOME", str(tmp_path / "cache"))
    ran: list[int] = []
    job_fault = Fault("look before you merge", "it loops", "less")

    def until_checked(run: OpenRun, until: str = LAST) -> None:
        run_pipeline(run, "data")
        if until != LAST:
            return
        seed = run.job.recipe.train.seed
        ran.append(seed)
        if seed == 1:
            raise GateFailed(job_fault)

    monkeypatch.setattr("mlx_ft.sweep.run_pipeline", until_checked)
    settings = sweep.grid_settings(["train.seed=0,1,2"])
    members = sweep.open_members(settings, lambda more: open_run_of(place, *SMALL, *more))
    stopped = sweep.run_members(members, Console())
    assert ran == [0, 1, 2] and [error.faults[0] for error in stopped] == [job_fault]
    assert len({member.run.job.folder for member in members}) == 3
    text = sweep.table_lines(members)
    for member in members:
        assert member.run.job.folder.name in text
        assert run_document(member.run.job.folder)["status"] == "stopped"
    assert "train.seed" in text.splitlines()[0] and len(text.splitlines()) == 5
    runs = [str(member.run.job.folder) for member in members]
    assert shlex.split(sweep.next_step(members)) == ["mlx-ft", "compare", *runs]
    shutil.rmtree(place / "runs")


def test_all_members_are_checked_before_the_first_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_FT_HOME", str(tmp_path / "cache"))
    settings = sweep.grid_settings(["train.num_layers=2,3", "train.batch_size=4,99"])
    members = sweep.open_members(settings, lambda more: open_run_of(tmp_path, *SMALL, *more))
    with pytest.raises(RecipeError) as caught:
        sweep.run_members(members, Console())
    assert [fault.where for fault in caught.value.faults] == [
        "train.num_layers=2, train.batch_size=99: check batch_size",
        "train.num_layers=3, train.batch_size=4: check num_layers",
        "train.num_layers=3, train.batch_size=99: check num_layers",
        "train.num_layers=3, train.batch_size=99: check batch_size",
    ]
    assert not list((tmp_path / "runs").glob("*/train*"))


def test_a_member_that_is_done_or_worked_on_is_not_checked(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Path] = []

    def counted(run: OpenRun, until: str = LAST) -> None:
        if until != LAST:
            checked.append(run.job.folder)
            run_pipeline(run, until)

    monkeypatch.setattr("mlx_ft.sweep.run_pipeline", counted)
    settings = sweep.grid_settings(["train.seed=0,1"])
    done, other = sweep.open_members(settings, lambda more: open_run_of(finished, *more))
    with working(other.run.job.folder):
        assert sweep.run_members([done, other], Console()) == []
    assert checked == [other.run.job.folder]


def test_a_wrong_grid_is_wrong_input_and_nothing_is_begun(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(MINIMAL)
    command = [sys.executable, "-m", "mlx_ft", "sweep", "r.yaml", "--grid", "train.sed=1,2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("did you mean train.seed?") == 2 and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
