"""The command line: exit codes, where output goes, and that it is there at once."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm import load as mlx_lm_load

from mlx_ft.cli import main
from tests.support.chats import chat, hostile_lines
from tests.support.jobs import write_place
from tests.support.models import write_tiny_model
from tests.support.rows import write_rows
from tests.support.run_folders import write_run
from tests.support.slow import fast_rows_first

FLAT = """
model: model
train: true
data: data
num_layers: 2
iters: 240
batch_size: 4
learning_rate: 3e-3
val_batches: 1
steps_per_eval: 20
adapter_path: adapters
lora_parameters: {rank: 16, scale: 2.0, dropout: 0.0}
mask_prompt: true
"""


def mlx_ft(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_ft", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# What --help may load: click, what it needs of the standard library, and the modules of the verbs.
# A count and not a time: it is the same on a busy machine.
MOST_MODULES = 160
HEAVY = ("mlx.core", "mlx_lm", "transformers", "numpy", "pydantic", "rich", "matplotlib", "yaml")


def printed_help(*verb: str) -> str:
    """Return what `mlx-ft VERB --help` prints; checks the exit code and what it imports."""
    code = (
        "import sys\nbefore = set(sys.modules)\nfrom mlx_ft.cli.main import main\n"
        f"sys.argv = ['mlx-ft', *{verb!r}, '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"heavy = set({HEAVY!r}) & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        f"assert len(sys.modules) <= {MOST_MODULES}, set(sys.modules) - before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_loads_nothing_heavy() -> None:
    printed = printed_help()
    assert "check" in printed and "run" in printed


@pytest.mark.parametrize("verb", list(main.cli.commands))
def test_help_of_every_verb_loads_nothing_heavy(verb: str) -> None:
    assert "Usage: " in printed_help(verb)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: x\n", ["data", "missing"]),
        ("model: x\ndata: {path: d}\ntrain: {batchsize: 4}\n", ["batch_size"]),
        ("model: x\ndata: {path: d}\ntrain: {batch_size: true}\n", ["train.batch_size"]),
        ("model: x\ndata: {path: d}\ntrain: {epochs: 1, iters: 5}\n", ["epochs", "iters"]),
        ("model: [x\n", ["r.yaml"]),
    ],
)
def test_a_wrong_recipe_is_exit_2_and_a_message_without_mlx(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    (tmp_path / "r.yaml").write_text(text)
    done = mlx_ft("check", "r.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "r.yaml" in done.stderr
    for word in expected:
        assert word in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"], "nothing half-written"
    code = (
        "import sys\nfrom mlx_ft.cli.main import main\nsys.argv = ['mlx-ft', 'check', 'r.yaml']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 2\n"
        "assert 'mlx.core' not in sys.modules"
    )
    checked = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("spoil", "expected"),
    fast_rows_first(
        [
            (lambda place: (place / "data/train.jsonl").unlink(), "train.jsonl"),
            (lambda place: (place / "data/train.jsonl").write_text(""), "train.jsonl"),
            (
                lambda place: (place / "data/train.jsonl").write_text(
                    (place / "data/train.jsonl").read_text() + '{"messages": [\n'
                ),
                "train.jsonl:25",
            ),
            (lambda place: (place / "model/config.json").unlink(), "config.json"),
            (lambda place: (place / "model/model.safetensors").unlink(), "model"),
            (
                lambda place: (place / "model/tokenizer_config.json").write_text("{}"),
                "chat template",
            ),
            (lambda place: (place / "runs").write_text("a file"), "runs"),
        ],
        4,
    ),
)
def test_wrong_input_is_exit_2_with_one_clear_message(
    tmp_path: Path, spoil: object, expected: str
) -> None:
    write_tiny_model(tmp_path / "model")
    write_rows(tmp_path / "data")
    (tmp_path / "r.yaml").write_text("model: ./model\ndata: {path: data}\n")
    assert callable(spoil)
    spoil(tmp_path)
    done = mlx_ft("run", "r.yaml", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert expected in done.stderr
    assert " - " in done.stderr, "says what to do"


@pytest.mark.slow
def test_a_flat_mlx_lm_file_trains_and_leaves_the_adapter_where_it_says(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    write_rows(tmp_path / "data")
    (tmp_path / "lora.yaml").write_text(FLAT)
    done = mlx_ft("train", "lora.yaml", cwd=tmp_path)
    # A random model of two layers may well be found degenerate: the adapter must exist if not.
    assert done.returncode in (0, 1), done.stderr
    assert "iters" in done.stderr, "says how it read the flat keys"
    if done.returncode == 1:
        assert "look before you merge" in done.stderr
        pytest.fail("the tiny model of this test was to pass the look: train it longer")
    assert sorted(p.name for p in (tmp_path / "adapters").iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
    ]
    mlx_lm_load(str(tmp_path / "model"), adapter_path=str(tmp_path / "adapters"))


def test_show_of_no_run_is_a_message(tmp_path: Path) -> None:
    done = mlx_ft("show", "runs/none", cwd=tmp_path)
    assert done.returncode == 2 and "no such folder" in done.stderr


def test_unknown_verbs_and_options_are_exit_2() -> None:
    assert mlx_ft("trian").returncode == 2
    assert mlx_ft("run", "--nope").returncode == 2


def test_version_is_the_packages() -> None:
    from mlx_ft import __version__

    assert mlx_ft("--version").stdout.strip().endswith(__version__)


def test_recipe_upgrade_prints_a_recipe_that_loads(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text(FLAT)
    done = mlx_ft("recipe", "upgrade", "lora.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    from mlx_ft.recipe.load import load_recipe

    (tmp_path / "new.yaml").write_text(done.stdout)
    loaded = load_recipe(tmp_path / "new.yaml", ())
    assert loaded.form == "recipe"
    assert json.loads(loaded.recipe.model_dump_json())["train"]["iters"] == 240


def test_data_show_prints_rows_as_they_are_trained(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    write_rows(tmp_path / "data")
    (tmp_path / "r.yaml").write_text("name: r\nmodel: ./model\ndata: {path: data}\n")
    done = mlx_ft("data", "show", "r.yaml", "--rows", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of them trained") == 2 and "\u00ab" in done.stdout
    assert "next     mlx-ft check r.yaml" in done.stdout
    assert not (tmp_path / "runs").exists(), "it only looks"


def test_fit_prints_what_a_mac_can_train(tmp_path: Path) -> None:
    done = mlx_ft("fit", "--memory", "16GB", cwd=tmp_path)
    assert done.returncode == 0 and "Llama-3.2-3B" in done.stdout and "next " in done.stdout
    done = mlx_ft("fit", "--memory", "much", cwd=tmp_path)
    assert done.returncode == 2 and "16GB" in done.stderr


@pytest.fixture(scope="module")
def hostile_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    write_tiny_model(folder / "model")
    write_rows(folder / "data")
    (folder / "r.yaml").write_text(f"model: {folder}/model\ndata: {{path: {folder}/data}}\n")
    return folder


@pytest.mark.stress
@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(hostile_lines, min_size=1, max_size=3), beside_good_rows=st.booleans())
def test_whatever_is_in_the_rows_a_check_ends_with_its_exit_code_and_a_message(
    lines: list[bytes],
    beside_good_rows: bool,
    hostile_place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Never with another exception, which would be a traceback."""
    good = [json.dumps(chat()).encode()] if beside_good_rows else []
    (hostile_place / "data" / "train.jsonl").write_bytes(b"\n".join([*good, *lines]))
    recipe, runs = str(hostile_place / "r.yaml"), str(hostile_place / "runs")
    monkeypatch.setattr(sys, "argv", ["mlx-ft", "check", recipe, "--runs", runs])
    code = 0
    try:
        main.main()
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    assert code in (0, 2)
    assert "Traceback" not in said.err
    assert ("wrong input: " in said.err) == (code == 2)
    assert ("nothing stops it" in said.out) == (code == 0)


@pytest.mark.slow
def test_the_verbs_on_many_runs_end_with_a_next_step_and_without_mlx(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs")
    clean = ("clean", "--runs", "runs")
    for arguments in (
        ("runs", "--runs", "runs"),
        ("compare", str(run)),
        ("watch", str(run)),
        clean,
        (*clean, "--fused"),
    ):
        done = mlx_ft(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith("next     mlx-ft "), arguments
        assert "\x1b" not in done.stdout
    assert (run / "export" / "fused-f16").is_dir()  # nobody said yes
    assert mlx_ft(*clean, "--fused", "--yes", cwd=tmp_path).returncode == 0
    assert not (run / "export" / "fused-f16").exists()
    assert mlx_ft(*clean, "--yes", cwd=tmp_path).returncode == 2
    assert mlx_ft("compare", "nowhere", "nowhere", cwd=tmp_path).returncode == 2
    listed = mlx_ft("runs", "--runs", "runs", "--json", cwd=tmp_path)
    assert json.loads(listed.stdout)["runs"][0]["state"] == "finished"


def next_command(printed: str) -> list[str]:
    """Return the words of the command that the line `next` names, without `mlx-ft`."""
    line = next(line for line in printed.splitlines() if line.startswith("next     "))
    program, *words = shlex.split(line.removeprefix("next     "))
    assert program == "mlx-ft"
    return words


@pytest.mark.parametrize("named", [True, False])
def test_the_next_command_of_clean_removes_what_was_shown_and_nothing_else(
    tmp_path: Path, named: bool
) -> None:
    shown = write_run(tmp_path / "shown runs")
    near, other = write_run(tmp_path / "other"), write_run(tmp_path / "runs")
    far = shown if not named else near
    place = (str(far),) if named else ("--runs", "shown runs")
    listed = mlx_ft("clean", *place, "--fused", cwd=tmp_path)
    again = mlx_ft(*next_command(listed.stdout), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    for run in (shown, near, other):
        assert (run / "export" / "fused-f16").is_dir() == (run != far)


def test_the_next_command_of_clean_keeps_folder_kinds_and_age(tmp_path: Path) -> None:
    failed = write_run(tmp_path / "mine", "failed")
    for path in (failed, *failed.iterdir()):
        os.utime(path, (time.time() - 86400.0,) * 2)  # too young for the default age
    asked = ("clean", "--runs", "mine", "--failed", "--older-than", "0.5")
    listed = mlx_ft(*asked, cwd=tmp_path)
    assert failed.name in listed.stdout
    assert mlx_ft(*next_command(listed.stdout), cwd=tmp_path).returncode == 0
    assert not failed.exists()
    empty = next_command(mlx_ft(*asked, cwd=tmp_path).stdout)
    assert empty == ["runs", "--runs", "mine"]


def test_the_next_command_of_check_is_for_the_same_recipe_and_run(tmp_path: Path) -> None:
    write_place(tmp_path)
    (tmp_path / "r.yaml").rename(tmp_path / "my recipe.yaml")
    sets = ("--set", "train.iters=4", "--set", "train.epochs=null")
    asked = ("my recipe.yaml", *sets, "--runs", "my runs")
    done = mlx_ft("check", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(next_command(done.stdout)) == sorted(["run", *asked])


def test_results_that_nobody_reads_are_no_failure(tmp_path: Path) -> None:
    write_run(tmp_path / "runs")
    theirs, ours = os.pipe()
    os.close(theirs)
    command = [sys.executable, "-m", "mlx_ft", "runs", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, stdout=ours, stderr=subprocess.PIPE, timeout=60, check=False
    )
    os.close(ours)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
def test_a_training_goes_on_when_nobody_reads_it_any_more(tmp_path: Path) -> None:
    """As with `2>&1 | head -1`: also the training process writes into the closed pipe."""
    write_place(tmp_path)
    command = [sys.executable, "-m", "mlx_ft", "train", "r.yaml"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "train" / "adapter" / "adapters.safetensors").is_file()
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"


@pytest.mark.slow
def test_a_training_whose_terminal_closes_leaves_a_checkpoint(tmp_path: Path) -> None:
    """The signal comes twice, as it does then, and the terminal takes no more words."""
    write_place(tmp_path)
    ours, theirs = os.openpty()
    command = ["train", "r.yaml", "--set", "train.epochs=4000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_ft", *command], cwd=tmp_path, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    until = time.monotonic() + 100
    while not list(tmp_path.glob("runs/*/train.tmp/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < until
        os.read(ours, 65536)
    os.close(ours)
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
    assert process.wait(timeout=100) == 130
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert list(run.glob("train.tmp/checkpoints/*/state.json"))


@pytest.mark.parametrize(
    ("error", "code"),
    [(click.Abort(), 130), (KeyboardInterrupt(), 130), (click.exceptions.Exit(3), 3)],
)
def test_a_question_that_is_not_answered_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    """click's own exceptions are RuntimeErrors, as the failures of a GPU are."""

    def ending(**_: object) -> None:
        raise error

    monkeypatch.setattr(main.cli, "main", ending)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == code
