"""Cleaning removes what was asked for, and whatever is left is as whole as it was."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mlx_ft.errors import RunError
from mlx_ft.runs.clean import KINDS, Rubbish, drop_fused, find_rubbish, listing, remove, remove_all
from mlx_ft.runs.document import run_document
from mlx_ft.runs.folder import read_manifest, seal, update_record, verify_files
from mlx_ft.runs.lock import working
from mlx_ft.system.cache import cache_home
from mlx_ft.system.console import Console
from mlx_ft.system.files import write_json
from tests.support.run_folders import write_run

ALL = list(KINDS)


def write_checkpoints(stage: Path, iterations: list[int], best: int) -> None:
    for iteration in iterations:
        folder = stage / "checkpoints" / f"{iteration:07d}"
        folder.mkdir(parents=True)
        (folder / "adapters.safetensors").write_bytes(b"weights" * 100)
        write_json(folder / "state.json", {"iteration": iteration, "best_iteration": best})
        seal(folder, "checkpoint", "inputs", {"iteration": iteration})


def reseal(stage: Path) -> None:
    manifest = read_manifest(stage)
    assert manifest is not None
    seal(stage, manifest.stage, manifest.inputs, manifest.info)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with five checkpoints: 3 is the best, 2 is pinned."""
    made = write_run(tmp_path / "runs")
    write_checkpoints(made / "train", [1, 2, 3, 4, 5], best=3)
    (made / "train" / "checkpoints" / "0000002.pinned").touch()
    reseal(made / "train")
    return made


def names(found: list[Rubbish]) -> list[str]:
    return sorted(each.path.name for each in found)


def found_in(run: Path, *kinds: str, days: float = 0) -> list[Rubbish]:
    return find_rubbish(run.parent, [], kinds or ALL, days)


def test_the_best_and_the_pinned_checkpoint_stay_and_the_stage_stays_whole(run: Path) -> None:
    before = run_document(run)["train"]
    found = found_in(run, "checkpoints")
    assert names(found) == ["0000001", "0000004", "0000005"]
    freed, errors = remove_all(found, Console())
    assert not errors and freed == sum(each.size_bytes for each in found) > 2000
    left = sorted(path.name for path in (run / "train" / "checkpoints").iterdir())
    assert left == ["0000002", "0000002.pinned", "0000003"]
    assert verify_files(run / "train") == []
    assert run_document(run)["train"] == before
    assert found_in(run, "checkpoints") == []


def test_an_unfinished_training_keeps_the_checkpoint_that_it_goes_on_from(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", "interrupted")
    write_checkpoints(run / "train.tmp", [1, 2, 3, 4], best=2)
    assert names(found_in(run, "checkpoints", "stale")) == ["0000001", "0000003"]


def test_without_a_known_best_the_newest_checkpoint_stays(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs")
    write_checkpoints(run / "train", [1, 2], best=0)
    reseal(run / "train")
    assert names(found_in(run, "checkpoints")) == ["0000001"]


def test_the_fused_model_goes_and_the_export_stays_whole(run: Path) -> None:
    (found,) = found_in(run, "fused")
    assert found.path == run / "export" / "fused-f16"
    remove(found)
    assert not found.path.exists() and verify_files(run / "export") == []
    assert found_in(run, "fused") == []
    (run / "export" / "fused-f16").mkdir()
    (run / "export" / "q5" / "model.safetensors").unlink()
    assert found_in(run, "fused") == []  # no quantized model: the fused one is the only one


def test_a_run_drops_its_own_fused_model_while_it_works_on_itself(run: Path) -> None:
    with working(run):
        drop_fused(run)
    assert not (run / "export" / "fused-f16").exists() and verify_files(run / "export") == []


@pytest.mark.slow
def test_nothing_of_a_run_that_is_worked_on_is_found_or_removed(run: Path) -> None:
    (run / "export.tmp").mkdir()
    update_record(run, status="gate_failed")
    found = found_in(run)
    update_record(run, status="running")
    with working(run):
        assert found_in(run) == []
        before = sorted(run.rglob("*"))
        for each in found:
            with pytest.raises(RunError, match="works on it"):
                remove(each)
        assert sorted(run.rglob("*")) == before


def test_stale_are_left_overs_that_nothing_goes_on_from(run: Path) -> None:
    unfinished = write_run(run.parent / "other", "interrupted").rename(run.parent / "unfinished-1")
    for folder in (run / "train.tmp", run / "export.tmp", unfinished / "eval.tmp"):
        folder.mkdir()
    old, young = run / ".run.json.1.tmp", run / ".run.json.2.tmp"
    for path in (old, young):
        path.touch()
    os.utime(old, (1, 1))
    doomed = run.parent / "x-0a1b2c3d.removing"
    doomed.mkdir()
    found = {each.path for each in found_in(run, "stale")}
    assert found == {run / "train.tmp", run / "export.tmp", old, doomed}
    # An unfinished training and evaluation go on where they were.
    assert (unfinished / "train.tmp").is_dir()


def test_failed_runs_go_whole_by_age_and_not_with_a_pinned_checkpoint(tmp_path: Path) -> None:
    failed = write_run(tmp_path / "runs", "failed")
    stopped = write_run(tmp_path / "made", "gate_failed").rename(tmp_path / "runs" / "stopped-1")
    assert found_in(failed, "failed", days=1) == []
    for run in (failed, stopped):
        os.utime(run / "run.json", (1, 1))
    assert {each.path for each in found_in(failed, "failed", days=1)} == {failed, stopped}
    pins = stopped / "train" / "checkpoints"
    pins.mkdir()
    (pins / "0000001.pinned").touch()
    (found,) = found_in(failed, "failed", days=1)
    remove(found)
    assert not failed.exists() and stopped.exists()
    assert sorted(path.name for path in failed.parent.iterdir()) == ["stopped-1"]


def test_old_prefixes_go_by_when_they_were_last_used(tmp_path: Path) -> None:
    folder = cache_home() / "prefix"
    ages = {"a" * 8: 10.0, "b" * 8: 1.0, "c.1.tmp": 1.0}
    for name, days in ages.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "states.bin").write_bytes(b"x" * 10)
        when = time.time() - days * 86400
        for path in (folder / name / "states.bin", folder / name):
            os.utime(path, (when, when))
    found = find_rubbish(tmp_path, [], ["prefix"], 7)
    assert names(found) == ["a" * 8, "c.1.tmp"]
    assert find_rubbish(tmp_path, [write_run(tmp_path)], ["prefix"], 7) == []


def test_a_link_out_of_the_run_is_not_followed(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write_checkpoints(outside, [1, 2], best=0)
    linked = write_run(run.parent / "made").rename(run.parent / "linked-1")
    (linked / "train" / "checkpoints").symlink_to(outside / "checkpoints")
    assert not [each for each in found_in(run, "checkpoints") if linked in each.path.parents]


def test_the_listing_adds_up(run: Path) -> None:
    found = found_in(run, "checkpoints", "fused")
    lines = listing(found)
    assert sum(str(run) in line for line in lines) == len(found) == 4
    assert lines[0].startswith("--checkpoints") and lines[-1].startswith("in all")
    assert listing([]) == ["nothing to remove"]


def test_what_is_no_run_is_told_and_not_taken_for_clean(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    wrong = [tmp_path / "TYPO", tmp_path / "data"]
    with pytest.raises(RunError) as caught:
        find_rubbish(tmp_path, [run, *wrong], ["checkpoints"], 0)
    assert [fault.where for fault in caught.value.faults] == [str(path) for path in wrong]
    with pytest.raises(RunError, match="no such folder"):
        find_rubbish(tmp_path / "none", [], ["failed"], 0)
    assert find_rubbish(tmp_path / "none", [], ["prefix"], 0) == []  # that is in the cache
