"""A disk that is full or may only be read is a message; what was saved before is whole and goes on.

The disks are real ones: small file systems in memory, mounted in a namespace of the test's own.
"""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_ft.system.console import Console
from mlx_ft.train.handoff import write_request
from mlx_ft.train.supervisor import last_checkpoint, supervise
from tests.support.models import write_tiny_model
from tests.support.training_processes import SUPERVISE, learned, request_in

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-e", "-c"]
MOUNT = "mkdir -p $0 && mount -t tmpfs -o size=$1 tmpfs $0"


def can_mount(place: Path) -> bool:
    try:
        done = subprocess.run(
            [*NAMESPACE, MOUNT, str(place), "1m"], capture_output=True, check=False
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.fixture(scope="module", autouse=True)
def needs_mount(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not can_mount(tmp_path_factory.mktemp("disk")):
        pytest.skip("nothing may be mounted here")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"), "llama", layers=3)


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_a_checkpoint_to_go_on_from(base: Path, tmp_path: Path) -> None:
    settings = {"save_every": 1, "keep_checkpoints": 1000}
    quiet = request_in(tmp_path / "quiet", base, **settings)
    supervise(quiet, tmp_path / "quiet", Console(io.StringIO()))

    request = request_in(tmp_path / "run", base, **settings)
    small, saved = tmp_path / "small", tmp_path / "saved"
    (tmp_path / "run" / "train.control").mkdir()
    on_small = replace(request, folder=small / "train.tmp")
    write_request(tmp_path / "run" / "train.control", on_small)
    script = (
        f"{MOUNT}; mkdir $0/train.tmp; code=0; {sys.executable} -c '{SUPERVISE}' $2 || code=$?; "
        "cp -r $0/train.tmp $3; exit $code"
    )
    done = subprocess.run(
        [*NAMESPACE, script, str(small), "400k", str(tmp_path / "run"), str(saved)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"{on_small.folder}: cannot be written" in done.stdout, done.stdout
    assert "free some space" in done.stdout and "Traceback" not in done.stderr

    rest = replace(request, folder=saved)
    assert 0 < last_checkpoint(rest) < 30, "the disk was full in the middle"
    said = io.StringIO()
    supervise(rest, tmp_path / "run", Console(said))
    assert learned(rest) == learned(quiet)
    assert not list(saved.glob("checkpoints/*.tmp"))


def test_a_disk_that_may_only_be_read_is_a_message(base: Path, tmp_path: Path) -> None:
    request = request_in(tmp_path / "run", base)
    (tmp_path / "run" / "train.control").mkdir()
    locked = tmp_path / "locked"
    write_request(tmp_path / "run" / "train.control", replace(request, folder=locked / "train.tmp"))
    script = (
        f"{MOUNT}; mkdir $0/train.tmp; mount -o remount,ro $0; {sys.executable} -c '{SUPERVISE}' $2"
    )
    done = subprocess.run(
        [*NAMESPACE, script, str(locked), "1m", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"{locked / 'train.tmp'}: cannot be written (Read-only file system)" in done.stdout
