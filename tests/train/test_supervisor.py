"""A run comes home through the deaths of its process, with the bits of a run that nobody disturbed.

The processes are real ones, killed with real signals at random moments.
"""

import fcntl
import io
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_ft.errors import Fault, GateFailed, Interrupted, ModelError, RunError
from mlx_ft.system.console import Console
from mlx_ft.system.files import read_json
from mlx_ft.train import handoff, supervisor
from mlx_ft.train.handoff import (
    Pulse,
    TrainRequest,
    read_error,
    read_heartbeat,
    read_request,
    write_error,
    write_request,
)
from mlx_ft.train.process import LivingConsole
from mlx_ft.train.supervisor import (
    MAX_DEATHS_WITHOUT_PROGRESS,
    Ending,
    cause_of,
    last_checkpoint,
    supervise,
)
from tests.support.models import write_tiny_model
from tests.support.slow import fast_first
from tests.support.training_processes import SUPERVISE, Killer, children, learned, request_in


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"), "llama", layers=3)


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("undisturbed")
    request = request_in(place, base)
    info = supervise(request, place, Console(io.StringIO()))
    assert info["iterations"] == 30 and not (place / "train.control").exists()
    return learned(request)


class Miser(Killer):
    """Takes away the memory that the training process may still ask for."""

    def strike(self, pid: int) -> None:
        _, hard = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (0, hard))


@pytest.mark.parametrize("number", fast_first([signal.SIGKILL, signal.SIGABRT]))
def test_a_run_comes_home_through_kills_with_the_same_bits(
    base: Path, tmp_path: Path, undisturbed: Any, number: signal.Signals
) -> None:
    request = request_in(tmp_path, base)
    said = io.StringIO()
    killer = Killer(request, tmp_path / "train.control", 2, number)
    killer.start()
    supervise(request, tmp_path, Console(said))
    killer.done.set()
    assert killer.left == 0, "the run was over too soon"
    assert said.getvalue().count("the training process died") == 2
    assert learned(request) == undisturbed


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux alone limits another process")
def test_a_run_comes_home_through_a_failed_allocation_with_the_same_bits(
    base: Path, tmp_path: Path, undisturbed: Any
) -> None:
    """The run comes home each time. The cause is named unless several threads end at once and
    garble each other's last words, or freed memory is enough: then it is done once more.
    """
    for attempt in range(6):
        place = tmp_path / str(attempt)
        request = request_in(place, base)
        said = io.StringIO()
        miser = Miser(request, place / "train.control", 1, 0)
        miser.start()
        supervise(request, place, Console(said))
        miser.done.set()
        assert miser.left == 0, "the run was over too soon"
        assert learned(request) == undisturbed
        if "died: memory could not be allocated" in said.getvalue():
            break
    assert said.getvalue().count("died: memory could not be allocated") == 1


@pytest.mark.slow
def test_segments_have_the_bits_of_one_process(
    base: Path, tmp_path: Path, undisturbed: Any
) -> None:
    request = request_in(tmp_path, base, segment_steps=16)
    said = io.StringIO()
    supervise(request, tmp_path, Console(said))
    assert said.getvalue().count("computing in") == 2, "two processes"
    assert learned(request) == undisturbed


@pytest.mark.slow
def test_what_an_orphan_answers_late_is_no_answer_to_the_next_run(
    base: Path, tmp_path: Path, undisturbed: Any
) -> None:
    """The process of a killed supervisor writes its error while the next one waits for its lock."""
    request = request_in(tmp_path, base, segment_steps=10)
    control = tmp_path / "train.control"
    control.mkdir()
    with (control / "lock").open("w") as lock, ThreadPoolExecutor() as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = pool.submit(supervise, request, tmp_path, Console(io.StringIO()))
        deadline = time.monotonic() + 60
        while not children():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        write_error(control, Interrupted(Fault("training", "stopped", "run again")))
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert run.result()["iterations"] == 30
    assert learned(request) == undisturbed


def supervised(request: TrainRequest, place: Path) -> "subprocess.Popen[str]":
    """Start a supervisor in a process of its own; return it once its training has begun."""
    control = place / "train.control"
    control.mkdir()
    write_request(control, request)
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, str(place)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "update 3 of" in line:
            break
    return process


@pytest.mark.slow
def test_an_interruption_reaches_the_training_and_leaves_a_checkpoint(
    base: Path, tmp_path: Path
) -> None:
    request = request_in(tmp_path, base, iters=100_000, save_every=100_000)
    process = supervised(request, tmp_path)
    assert process.stderr is not None and process.stdout is not None
    process.send_signal(signal.SIGINT)
    process.stderr.read()
    with process:  # closes its pipes
        assert process.wait(timeout=60) == 130
        assert "checkpoint written" in process.stdout.read()
    assert last_checkpoint(request) > 0


def test_a_supervisor_that_is_killed_takes_the_training_with_it(base: Path, tmp_path: Path) -> None:
    request = request_in(tmp_path, base, iters=100_000, save_every=100_000)
    with supervised(request, tmp_path) as process:  # closes its pipes
        process.kill()
    with (tmp_path / "train.control" / "lock").open("w") as lock:
        deadline = time.monotonic() + 30
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "the training goes on without anybody"
                time.sleep(0.1)
    assert last_checkpoint(request) > 0, "it wrote a checkpoint before it went"


def test_what_a_user_can_act_on_arrives_as_it_is(base: Path, tmp_path: Path) -> None:
    request = request_in(tmp_path, base)
    request = replace(request, model_folder=tmp_path / "nowhere")
    with pytest.raises(ModelError, match="nowhere"):
        supervise(request, tmp_path, Console(io.StringIO()))


def test_our_own_mistakes_are_not_tried_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_in(tmp_path, base)
    (request.data_folder / "train.safetensors").unlink()
    (request.data_folder / "train.safetensors").mkdir()
    starts = []
    run_child = supervisor._run_child

    def count(control: Path, console: Console) -> Ending:
        starts.append(control)
        return run_child(control, console)

    monkeypatch.setattr(supervisor, "_run_child", count)
    with pytest.raises((RuntimeError, RunError)):
        supervise(request, tmp_path, Console(io.StringIO()))
    assert len(starts) == 1


def test_a_process_that_only_dies_is_given_up_and_memory_is_saved_on_the_way(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = []

    def dies(control: Path, console: Console) -> Ending:
        budgets.append(read_request(control).recipe.train.micro_batch_tokens)
        return Ending(-signal.SIGKILL, ())

    monkeypatch.setattr(supervisor, "_run_child", dies)
    said = io.StringIO()
    with pytest.raises(RunError, match="3 times without getting on") as caught:
        supervise(request_in(tmp_path, base), tmp_path, Console(said))
    assert budgets == [1024, 1024, 512] and len(budgets) == MAX_DEATHS_WITHOUT_PROGRESS
    assert "micro_batch_tokens" in str(caught.value)
    assert "no checkpoint was reached" in str(caught.value) and "goes on" not in str(caught.value)


@pytest.mark.parametrize(
    ("ending", "anew"),
    [
        (Ending(-signal.SIGKILL, ()), True),
        (Ending(-signal.SIGABRT, ("[metal] Resource limit (499000) exceeded",)), False),
        (Ending(0, (), was_stuck=True), False),
    ],
)
def test_what_is_kept_after_deaths_is_said_and_what_is_not(ending: Ending, anew: bool) -> None:
    cause = cause_of(ending)
    assert cause is not None
    with pytest.raises(RunError, match="the same command goes on from iteration 40") as caught:
        supervisor._require_progress(MAX_DEATHS_WITHOUT_PROGRESS, 40, cause)
    assert ("other values of these keys begin another run" in str(caught.value)) == anew


def test_a_silent_process_is_ended(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STUCK_SECONDS", 0.5)
    control = tmp_path / "control"
    control.mkdir()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert supervisor._wait(process, control), "it was stuck"
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] "
            "Command buffer execution failed: Impacting Interactivity (0000000e:"
            "kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
            "watchdog",
        ),
        ("RuntimeError: [metal::malloc] Resource limit (499000) exceeded.", "resource handles"),
        ("kIOGPUCommandBufferCallbackErrorOutOfMemory", "GPU ran out of memory"),
        ("RuntimeError: [malloc] Unable to allocate 4294967296 bytes.", "could not be allocated"),
        ("terminate called after throwing an instance of 'std::bad_alloc'", "be allocated"),
    ],
)
def test_last_words_are_recognised(line: str, words: str) -> None:
    cause = cause_of(Ending(-signal.SIGABRT, ("something else", line)))
    assert cause is not None and words in cause.words
    assert cause.memory == ("alloca" in words or "out of memory" in words)


def test_endings_without_words() -> None:
    killed, crashed = cause_of(Ending(-9, ())), cause_of(Ending(-signal.SIGSEGV, ()))
    assert killed is not None and killed.memory
    assert crashed is not None and "SIGSEGV" in crashed.words
    assert cause_of(Ending(1, ("TypeError: unsupported operand",))) is None
    stuck = cause_of(Ending(-9, (), was_stuck=True))
    assert stuck is not None and "no sign of life" in stuck.words


def test_a_job_and_an_error_survive_the_way_through_files(base: Path, tmp_path: Path) -> None:
    request = request_in(tmp_path / "run", base)
    write_request(tmp_path, request)
    assert read_request(tmp_path) == request
    error = GateFailed([Fault("a", "b", "c"), Fault("d", "e", "f")])
    write_error(tmp_path, error)
    again = read_error(tmp_path)
    assert type(again) is GateFailed and again.faults == error.faults
    write_request(tmp_path, request)
    assert read_error(tmp_path) is None, "an earlier answer is not the next one's"


def test_the_keys_of_a_request_on_disk_stay_as_they_are(base: Path, tmp_path: Path) -> None:
    """A process of an earlier version may read the file."""
    write_request(tmp_path, request_in(tmp_path / "run", base))
    assert set(read_json(tmp_path / "job.json")) == {
        "recipe",
        "model_folder",
        "data_folder",
        "folder",
        "inputs",
        "model_identity",
        "prefix_limit_bytes",
        "prefix_folder",
        "look_prompts",
        "judge_look",
        "seeds",
    }


def test_every_line_and_every_update_of_progress_is_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a training that only narrates, or only shows progress, would be killed as stuck."""
    said, signs = io.StringIO(), []
    monkeypatch.setattr(handoff, "HEARTBEAT_SECONDS", 0.0)
    console = LivingConsole(said, Pulse(tmp_path))

    def look() -> None:
        beat = read_heartbeat(tmp_path)
        signs.append(beat and (beat.beats, beat.doing))

    look()
    console.say("a line")
    look()
    console.heading("a heading")
    look()
    with console.progress("training", 1.0) as progress:
        for step in (1, 2):
            progress.update(step / 2, f"step {step}")
            look()
    assert signs == [None, (1, "a line"), (2, "a heading"), (3, "step 1"), (4, "step 2")]
    assert said.getvalue() == "a line\na heading\n"


def test_heartbeats_come_once_a_second_and_count_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pulse = Pulse(tmp_path)
    assert read_heartbeat(tmp_path) is None
    for pause in (0.0, 0.5, 0.25, 7.0):
        now[0] += pause
        pulse.beat(f"at {now[0]}")
    beat = read_heartbeat(tmp_path)
    assert beat is not None and (beat.beats, beat.longest_seconds) == (4, 7.0)
    assert beat.doing == "at 107.75"
