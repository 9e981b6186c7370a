"""Any models are measured side by side without a training, and a second call goes on."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_ft.cli.main import cli
from mlx_ft.errors import InputError, ModelError
from mlx_ft.evaluate.measure import Wanted, evaluate_targets, evaluation_lines
from mlx_ft.recipe.cli_defaults import DEFAULT_BATCH_SIZE
from mlx_ft.recipe.evaluation import EvalRecipe
from mlx_ft.system.console import Console
from tests.support.jobs import write_place
from tests.support.models import write_tiny_model


def measure(*targets: str, **options: Any) -> tuple[dict[str, Any], Path]:
    wanted = Wanted(targets=targets, suites=(Path("suite.yaml"),), **options)
    return evaluate_targets(wanted, Console(io.StringIO()))


def rows_of(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    drop = ("seconds", "key")
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in lines]


def test_a_recipe_and_the_command_ask_as_many_at_a_time() -> None:
    assert EvalRecipe().batch_size == DEFAULT_BATCH_SIZE == Wanted((), ()).batch_size


@pytest.mark.slow
def test_every_column_of_a_run_says_again_what_it_said(finished_run: Path) -> None:
    columns = ("base", "adapter", "fused", "quantized")
    results, folder = measure(*(f"{finished_run}:{column}" for column in columns))
    for column in columns:
        name = f"{finished_run.name}--{column}"
        again = rows_of(folder / "small" / f"{name}.jsonl")
        assert again == rows_of(finished_run / "eval" / "small" / f"{column}.jsonl")
        assert results["columns"][name]["template"] == "same"
    assert results["warnings"] == [] and folder.parent == Path("runs")
    lines = evaluation_lines(results, folder)
    assert all(column in lines for column in columns) and "next " in lines


def test_a_run_a_folder_and_another_limit_are_side_by_side(finished_run: Path) -> None:
    results, folder = measure(str(finished_run), "model", limit=2)
    assert list(results["suites"]["small"]) == [f"{finished_run.name}--quantized", "model"]
    assert all(column["n"] == 2 for column in results["suites"]["small"].values())
    kept = {path: path.stat().st_mtime_ns for path in (folder / "small").iterdir()}
    again, same = measure(str(finished_run), "model", limit=2)
    assert again == results and same == folder and len(kept) == 2


def test_a_model_whose_template_was_changed_after_training_is_refused(finished_run: Path) -> None:
    config = finished_run / "export" / "q5" / "tokenizer_config.json"
    template = finished_run / "export" / "q5" / "chat_template.jinja"
    changed = template if template.exists() else config
    text = changed.read_text(encoding="utf-8")
    # As many bytes as before, which is all that the manifest looks at.
    changed.write_text(text.replace("unknown role ", "unknown rule "), encoding="utf-8")
    with pytest.raises(ModelError, match="template_sha256"):
        measure(str(finished_run))
    results, folder = measure(str(finished_run), allow_template_mismatch=True)
    assert "MEASURED WITH ANOTHER CHAT FORMAT" in evaluation_lines(results, folder)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        measure("model", "model", "no/such/folder", "./nor-this-one")
    assert len(caught.value.faults) == 3


def test_the_command_prints_a_table_or_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_place(tmp_path)
    write_tiny_model(tmp_path / "other", seed=1)
    monkeypatch.chdir(tmp_path)
    arguments = ["eval", "model", "other", "--suite", "suite.yaml", "--out", "measured"]
    table = CliRunner().invoke(cli, arguments)
    assert table.exit_code == 0, table.output
    assert "small (n 3)" in table.stdout and "answers  measured" in table.stdout
    printed = CliRunner().invoke(cli, [*arguments, "--json"])
    document = json.loads(printed.stdout)
    assert document == json.loads((tmp_path / "measured" / "results.json").read_text())
    for wrong in (
        ["eval"],
        ["eval", "a", "b"],
        ["eval", "--suite", "suite.yaml"],
        ["eval", "model", "--suite", "suite.yaml", "--server", "http://x/v1"],
        ["eval", "model", "--suite", "suite.yaml", "--set", "train.seed=1"],
    ):
        assert CliRunner().invoke(cli, wrong).exit_code == 2, wrong


@pytest.mark.slow
def test_ctrl_c_and_a_kill_lose_no_answer(tmp_path: Path) -> None:
    """A real child that is stopped in the middle, at first gently, then not; the third ends."""
    write_place(tmp_path)
    samples = [
        {"id": f"s{n}", "messages": [{"role": "user", "content": f"say {n}"}], "target": {}}
        for n in range(400)
    ]
    (tmp_path / "suite.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    command = [sys.executable, "-m", "mlx_ft", "eval", "model", "--suite", "suite.yaml"]
    command += ["--out", "out", "--batch-size", "4"]
    log = tmp_path / "out" / "small" / "model.jsonl"
    seen = 0
    for number in (signal.SIGINT, signal.SIGKILL):
        child = subprocess.Popen(
            command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        deadline = time.monotonic() + 90
        while (
            not log.exists() or log.read_bytes().count(b"\n") < seen + 20
        ) and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(number)
        _, told = child.communicate(timeout=60)
        if number == signal.SIGINT:
            assert child.returncode == 130 and "what was answered is kept" in told, told
        else:
            assert child.returncode == -signal.SIGKILL
        whole = [json.loads(line) for line in log.read_bytes().splitlines(keepends=True)[:-1]]
        assert len(whole) >= seen + 19
        seen = len(whole)
    kept = {row["key"]: row["seconds"] for row in whole}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in log.read_bytes().splitlines()]
    assert [row["id"] for row in rows] == [sample["id"] for sample in samples]
    now = {row["key"]: row["seconds"] for row in rows}
    assert {key: now[key] for key in kept} == kept, "what was written is not asked again"
