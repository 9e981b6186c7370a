"""The whole job on a tiny real model: order, skipping, continuing, and honest endings."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_ft.data import prepare, sources
from mlx_ft.data import stage as data_stage
from mlx_ft.data.contamination import contaminated_prompts
from mlx_ft.data.replay import replay_prompts
from mlx_ft.data.tokens import read_split
from mlx_ft.engine import generate, load
from mlx_ft.errors import GateFailed, InputError, ModelError, RunError
from mlx_ft.model.chat import ChatFormat, ChatRenderer
from mlx_ft.model.shapes import model_shape
from mlx_ft.pipeline import STAGES, fitted, is_complete, run_pipeline
from mlx_ft.preflight import stage as preflight_stage
from mlx_ft.preflight.fit import forecast
from mlx_ft.recipe.load import load_recipe
from mlx_ft.recipe.schema import DataRecipe
from mlx_ft.rehearse import rehearsal_sets, rehearse
from mlx_ft.runs.document import run_document
from mlx_ft.runs.folder import verify_files
from mlx_ft.runs.lock import worked_on, working
from mlx_ft.runs.names import STAGE_NAMES
from mlx_ft.system.files import read_json, write_json
from mlx_ft.system.hardware import machine
from tests.support.jobs import job_of, open_run_of, write_place
from tests.support.slow import fast_rows_first


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that a run needs, which is the current folder."""
    write_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def times_of(run: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in sorted(run.rglob("*")) if p.is_file()}


def test_what_a_check_finds_it_finds_again(place: Path) -> None:
    """The rows are done after the first time, but nothing that was found is forgotten."""
    for _ in range(2):
        with pytest.raises(InputError, match="num_layers"):
            run_pipeline(open_run_of(place, "train.num_layers=99"), "preflight")
    for _ in range(2):
        run_pipeline(open_run_of(place), "preflight")


def test_checking_a_finished_run_leaves_it_finished(finished: Path) -> None:
    opened = open_run_of(finished)
    job = opened.job
    run_pipeline(opened, "preflight")
    assert run_document(job.folder)["status"] == "done"


def test_a_rehearsal_goes_through_every_stage_and_leaves_nothing(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the run's own model as the base, which has something to say."""
    (fused,) = finished.glob("runs/*/export/fused*")
    sets = (f"model={fused}", "train.learning_rate=1e-6")
    recipe = load_recipe(finished / "r.yaml", sets).recipe
    runs = set((finished / "runs").iterdir())
    opened = open_run_of(finished, *sets, *rehearsal_sets(recipe))
    assert [len(suite.samples) for suite in opened.suites] == [2]
    rehearse(lambda more: open_run_of(finished, *sets, *more), miniature=False)
    left = set((finished / "runs").iterdir()) - runs
    assert [path.name for path in left] == [job_of(finished, *sets).folder.name], "what was checked"
    said = capsys.readouterr().err
    assert all(f"{stage} done in" in said for stage in ("data", "train", "export", "eval"))


def test_a_base_that_loops_is_stopped_before_it_is_trained(place: Path) -> None:
    """A random model loops: its training does not begin, and its answers are the evidence."""
    job_run = open_run_of(place, "preflight.accept={}")
    job = job_run.job
    with pytest.raises(InputError, match="base_health"):
        run_pipeline(job_run)
    answers = job.folder / "eval.tmp" / "small" / "base.jsonl"
    assert len(answers.read_text().splitlines()) == 3
    assert not (job.folder / "train").exists() and not (job.folder / "train.tmp").exists()
    findings = {f["check"]: f for f in read_json(job.folder / "preflight.json")["findings"]}
    assert findings["base_health"]["level"] == "fail" and findings["capacity"]["level"] == "ok"
    accepting_run = open_run_of(place)
    accepting = accepting_run.job
    run_pipeline(accepting_run, "base")
    (finding,) = [
        f
        for f in read_json(accepting.folder / "preflight.json")["findings"]
        if f["check"] == "base_health"
    ]
    assert finding["level"] == "warn" and finding["fix"] == "accepted: a random model"
    assert "accepted: a random model" in (accepting.folder / "report.html").read_text()


def test_the_bases_answers_are_not_asked_for_twice(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts to four models are twelve answers, the look at the base before training too."""
    opened = open_run_of(finished)
    job = opened.job
    shutil.rmtree(job.folder / "eval")
    asked: list[int] = []
    plain = generate.generate

    def counted(loaded: Any, prompts: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        return plain(loaded, prompts, **options)

    monkeypatch.setattr(generate, "generate", counted)
    run_pipeline(opened)
    assert sum(asked) == 12 and run_document(job.folder)["status"] == "done"


def test_a_tokenizer_is_read_for_texts_to_count_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [open_run_of(place), open_run_of(place, "preflight.single_tokens=[<|im_end|>]")]
    for opened in both:
        run_pipeline(opened, "data")
    read: list[Path] = []
    plain = ChatRenderer.from_folder

    def counted(folder: Path, chat: ChatFormat) -> ChatRenderer:
        read.append(folder)
        return plain(folder, chat)

    monkeypatch.setattr(ChatRenderer, "from_folder", counted)
    measured = []
    for opened, times in zip(both, (0, 1), strict=True):
        run_pipeline(opened, "preflight")
        job = opened.job
        assert read == [job.model.path] * times
        findings = read_json(job.folder / "preflight.json")["findings"]
        measured += [f["measured"] for f in findings if f["check"] == "single_tokens"]
    assert measured[1] == "1 texts are one token each" != measured[0]


def test_fit_changes_what_is_needed_and_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fitted(lambda more: open_run_of(place, *more)).job.recipe == job_of(place).recipe
    whole = preflight_stage.preflight_facts(job_of(place))
    shape = model_shape(whole.model_config)
    assert shape is not None
    need = forecast(whole, shape, whole.recipe.train).peak_bytes
    small = replace(machine(), memory_bytes=round(need * 0.97 / 0.9))
    monkeypatch.setattr(preflight_stage, "machine", lambda: small)
    opened = fitted(lambda more: open_run_of(place, *more))
    job = opened.job
    assert job.recipe.train != job_of(place).recipe.train
    assert "--fit sets train." in capsys.readouterr().err
    run_pipeline(opened, "preflight")
    findings = {f["check"]: f for f in read_json(job.folder / "preflight.json")["findings"]}
    assert findings["memory"]["level"] == "ok"


def test_rows_are_compared_with_the_prompts_once_with_fit_too(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []

    def counted(rows: Any, prompts: Any) -> Any:
        compared.append(len(rows))
        return contaminated_prompts(rows, prompts)

    monkeypatch.setattr("mlx_ft.preflight.stage.contaminated_prompts", counted)
    opened = fitted(lambda more: open_run_of(place, *more))
    assert compared == []
    run_pipeline(opened, "preflight")
    assert compared == [24]


@pytest.mark.parametrize(
    "sets", [(), ("train.grad_accumulation_steps=3", "train.epochs=null", "train.iters=900")]
)
def test_a_rehearsal_makes_two_updates_and_keeps_the_rest(
    place: Path, sets: tuple[str, ...]
) -> None:
    recipe = load_recipe(place / "r.yaml", sets).recipe
    small = load_recipe(place / "r.yaml", (*sets, *rehearsal_sets(recipe))).recipe
    assert small.train.iters == 2 * recipe.train.grad_accumulation_steps
    assert small.train.epochs is None and small.data.limit == 8
    for kept in ("lora_parameters", "num_layers", "batch_size", "learning_rate", "seed"):
        assert getattr(small.train, kept) == getattr(recipe.train, kept)
    assert small.model == recipe.model
    assert small.export == recipe.export.model_copy(update={"min_survival": None})


def test_the_rows_of_a_run_are_read_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[DataRecipe] = []
    plain = sources.read_splits

    def counted(data: DataRecipe) -> Any:
        read.append(data)
        return plain(data)

    for room in (data_stage, prepare):
        monkeypatch.setattr(room, "read_splits", counted)
    run_pipeline(open_run_of(place), "preflight")
    assert len(read) == 1


def test_the_base_model_is_asked_once_for_rows_that_are_replayed(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the run's own model as the base, since a random one never ends."""
    monkeypatch.setenv("MLX_FT_HOME", str(finished / "cache"))
    (fused,) = finished.glob("runs/*/export/fused*")
    sets = (f"model={fused}", "data.replay=0.2")
    opened = open_run_of(finished, *sets)
    job = opened.job
    plain = open_run_of(finished, sets[0]).rows["train"].rows
    rows = opened.rows["train"].rows
    assert rows[: len(plain)] == plain and len(plain) == 24
    replayed = rows[len(plain) :]
    assert len(replayed) == 6
    prompts = [row.messages[0]["content"] for row in replayed if row.messages]
    assert prompts == [prompt for prompt in replay_prompts() if prompt in prompts]
    run_pipeline(opened, "preflight")
    stats = read_json(job.folder / "data" / "stats.json")
    assert stats["splits"]["train"]["categories"]["replay"] == 6
    assert opened.rows["valid"] == open_run_of(finished, sets[0]).rows["valid"]

    def loads(*_: object, **__: object) -> None:
        pytest.fail("the base model was loaded again")

    monkeypatch.setattr(load, "load_model", loads)
    assert open_run_of(finished, *sets).rows["train"].rows == rows


def test_the_whole_job_and_then_nothing_again(finished: Path) -> None:
    job = job_of(finished)
    document = run_document(job.folder)
    assert document["status"] == "done"
    keys = "schema run status recipe model data preflight train export survival eval gates"
    assert list(document) == [*keys.split(), "warnings", "columns", "timings", "environment"]
    for column in ("base", "adapter", "fused", "quantized"):
        result = document["eval"]["small"][column]
        assert set(result) >= {"mean", "n", "low", "high", "by_category", "failures"}
        assert result["n"] == 3 and 0 <= result["low"] <= result["mean"] <= result["high"] <= 1
    assert all(check["ok"] for check in document["export"]["checks"])
    losses = [m["loss"] for m in document["train"]["metrics"] if m["kind"] == "validation"]
    assert losses[-1] < losses[0]
    assert len((job.folder / "train" / "samples.jsonl").read_text().splitlines()) == 5
    html = (job.folder / "report.html").read_text()
    assert "running" not in html.lower().split("<h2")[0]

    before = times_of(job.folder)
    run_pipeline(open_run_of(finished))
    assert times_of(job.folder) == before, "a finished run is not touched"


@pytest.mark.slow
def test_a_fused_model_that_is_not_to_be_kept_goes_and_nothing_is_done_again(place: Path) -> None:
    sets = ("export.keep_fused=false",)
    run_pipeline(open_run_of(place, *sets))
    run = job_of(place, *sets).folder
    assert not (run / "export" / "fused-f16").exists()
    assert verify_files(run / "export") == []
    before = sorted(run.rglob("*"))
    run_pipeline(open_run_of(place, *sets))
    assert sorted(run.rglob("*")) == before


def test_two_pipelines_do_not_work_on_one_run_at_once(place: Path) -> None:
    opened = open_run_of(place)
    job = opened.job
    with working(job.folder), pytest.raises(RunError, match="works on it"):
        run_pipeline(opened, "data")
    run_pipeline(opened, "data")
    assert worked_on(job.folder) is False


def test_only_the_unfinished_stage_is_done_again(finished: Path) -> None:
    job = job_of(finished)
    assert is_complete(job, "export")
    adapter = job.folder / "train" / "adapter" / "adapters.safetensors"
    trained = adapter.stat().st_mtime_ns
    (job.folder / "export" / "q5" / "model.safetensors").unlink()
    assert not is_complete(job, "export") and is_complete(job, "train")
    run_pipeline(open_run_of(finished))
    assert is_complete(job, "export")
    assert adapter.stat().st_mtime_ns == trained


def test_a_changed_value_gets_its_own_folder(place: Path) -> None:
    folders = {
        job_of(place, *sets).folder for sets in ((), ("train.seed=1",), ("export.q_bits=6",))
    }
    assert len(folders) == 3
    (place / "data" / "train.jsonl").write_text(
        (place / "data" / "train.jsonl").read_text().replace("fox", "cat")
    )
    assert job_of(place).folder not in folders


def test_how_often_a_run_could_be_continued_makes_no_other_run(finished: Path) -> None:
    """Its bits are the same, as the kills above and segments show; memory's are not."""
    job = job_of(finished)
    for value in ("save_every=7", "keep_checkpoints=5", "segment_steps=50"):
        other = job_of(finished, f"train.{value}")
        assert (
            other.folder == job.folder
            and other.inputs == job.inputs
            and is_complete(other, "train")
        )
    for value in ("micro_batch_tokens=64", "grad_checkpoint=true", "steps_per_report=5"):
        assert job_of(finished, f"train.{value}").folder != job.folder


def test_other_weights_to_start_from_are_another_run(place: Path) -> None:
    """The file's content counts, not what it is called."""
    sets = ("train.resume_adapter_file=start.safetensors",)
    runs, trainings = set(), set()
    for value in (0.0, 1.0):
        mx.save_safetensors(str(place / "start.safetensors"), {"a": mx.full((2,), value)})
        job = job_of(place, *sets)
        runs.add(job.folder)
        trainings.add(job.inputs["train"])
        assert job.inputs["data"] == job_of(place).inputs["data"]
    assert len(runs | {job_of(place).folder}) == 3
    assert len(trainings | {job_of(place).inputs["train"]}) == 3
    (place / "start.safetensors").rename(place / "same")
    assert job_of(place, "train.resume_adapter_file=same").inputs == job.inputs


def test_weights_that_do_not_fit_stop_before_training(place: Path) -> None:
    mx.save_safetensors(
        str(place / "start.safetensors"), {"model.layers.1.lora_a": mx.zeros((8, 2))}
    )
    opened = open_run_of(place, "train.resume_adapter_file=start.safetensors")
    with pytest.raises(InputError, match="it has rank 2, the recipe says 16"):
        run_pipeline(opened, "preflight")


def test_rows_longer_than_the_context_are_counted_before_training(place: Path) -> None:
    config = read_json(place / "model" / "config.json")
    write_json(place / "model" / "config.json", config | {"max_position_embeddings": 60})
    opened = open_run_of(place)
    job = opened.job
    run_pipeline(opened, "preflight")
    findings = {f["check"]: f for f in read_json(job.folder / "preflight.json")["findings"]}
    lengths = read_split(job.folder / "data" / "train.safetensors").lengths
    longer = sum(int(length) > 60 for length in lengths)
    assert 0 < longer < len(lengths)
    assert findings["context"]["measured"].startswith(f"{longer} of 24 rows are longer")


def test_stages_stop_where_they_are_asked_to(place: Path) -> None:
    opened = open_run_of(place)
    job = opened.job
    run_pipeline(opened, "train")
    assert is_complete(job, "train") and not (job.folder / "export").exists()
    assert read_json(job.folder / "run.json")["status"] == "stopped"


def test_a_degenerate_model_never_reaches_the_export(place: Path) -> None:
    """A model that has learned nothing repeats itself: the look before merging stops it."""
    opened = open_run_of(place, "train.epochs=1", "train.learning_rate=1e-6")
    job = opened.job
    with pytest.raises(GateFailed, match="look before you merge"):
        run_pipeline(opened)
    record = read_json(job.folder / "run.json")
    assert record["status"] == "gate_failed" and "look before" in record["exit_reason"]
    assert not (job.folder / "train").exists() and not (job.folder / "export").exists()
    assert (job.folder / "report.html").exists(), "the evidence is in the report"


def test_faults_of_model_data_and_suites_come_together(place: Path) -> None:
    (place / "suite.jsonl").write_text("{broken\n")
    sets = ("model=./nowhere", "data.path=nothing", "train.resume_adapter_file=none.safetensors")
    with pytest.raises(InputError) as caught:
        job_of(place, *sets)
    text = str(caught.value)
    assert "nowhere" in text and "nothing" in text and "suite.jsonl:1" in text
    assert "train.resume_adapter_file: none.safetensors: not found" in text
    assert not (place / "runs").exists(), "nothing half-written"


def test_a_failed_check_stops_before_training(place: Path) -> None:
    opened = open_run_of(place, "train.num_layers=7")
    job = opened.job
    with pytest.raises(InputError, match="num_layers"):
        run_pipeline(opened)
    assert not (job.folder / "train").exists() and not (job.folder / "train.tmp").exists()


def test_another_template_in_the_exported_model_is_refused(finished: Path) -> None:
    """The evaluation asks only as the training rendered: a changed template stops it by name."""
    job = job_of(finished)
    shutil.rmtree(job.folder / "eval")
    path = job.folder / "export" / "q5" / "tokenizer_config.json"
    text = path.read_text()
    changed = text.replace("<|im_start|>assistant", "<|im_start|>Assistant")
    assert len(changed) == len(text) and changed != text
    path.write_text(changed)
    with pytest.raises(ModelError, match="template"):
        run_pipeline(open_run_of(finished))


def _start(place: Path, verb: str = "run") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_ft", verb, "r.yaml"],
        cwd=place,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"NO_COLOR": "1"},
    )


@pytest.fixture
def long_run(place: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    text = (place / "r.yaml").read_text()
    (place / "r.yaml").write_text(text.replace("epochs: 40", "epochs: 40\n  save_every: 5"))
    process = _start(place)
    deadline = time.monotonic() + 60
    while not list(place.glob("runs/*/train.tmp/checkpoints/*/manifest.json")):
        assert time.monotonic() < deadline
        if process.poll() is not None:
            pytest.fail(f"it ended by itself: {process.communicate()[1]}")
        time.sleep(0.05)
    yield place, process
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(
    long_run: tuple[Path, subprocess.Popen[str]],
) -> None:
    place, process = long_run
    process.send_signal(signal.SIGINT)
    _, narration = process.communicate(timeout=60)
    assert process.returncode == 130, narration
    assert "Traceback" not in narration and "run the same command again" in narration
    job = job_of(place)
    assert read_json(job.folder / "run.json")["status"] == "interrupted"
    done = _start(place, "train")
    out, narration = done.communicate(timeout=120)
    assert done.returncode == 0, narration
    assert "adapter" in out and "iteration 0 of" not in narration, "it continued"


FAILING = """
import sys
from pathlib import Path
from mlx_ft import pipeline
from mlx_ft.{module} import {function} as whole
from mlx_ft.{module} import __name__ as place

def failing(*arguments, **named):
    times = Path("failures")
    if len(times.read_text() if times.exists() else "") < {times}:
        times.write_text(times.read_text() + "." if times.exists() else ".")
        raise RuntimeError("[METAL] Command buffer execution failed: {words}")
    return whole(*arguments, **named)

setattr(sys.modules[place], "{function}", failing)
from mlx_ft.cli.main import main
sys.argv = ["mlx-ft", "run", "r.yaml"]
main()
"""


@pytest.mark.parametrize(
    ("module", "function"),
    fast_rows_first(
        [
            ("export.build", "export_model"),
            ("evaluate.stage", "evaluate"),
            ("preflight.base_model", "check_base"),
        ],
        1,
    ),
)
def test_a_gpu_error_begins_the_stage_again_in_a_new_process(
    place: Path, finished_once: Path, module: str, function: str
) -> None:
    """And the exported model has the same bytes as if nothing had happened."""
    code = FAILING.format(module=module, function=function, times=1, words="Caused GPU Hang Error")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "a GPU command hung" in done.stderr and "Traceback" not in done.stderr
    assert read_json(job_of(place).folder / "run.json")["status"] == "done"
    (untouched,) = finished_once.glob("runs/*/export/q5/model.safetensors")
    (found,) = place.glob("runs/*/export/q5/model.safetensors")
    assert found.read_bytes() == untouched.read_bytes()


@pytest.mark.slow
def test_kill_9_then_the_same_result_as_if_nothing_happened(
    long_run: tuple[Path, subprocess.Popen[str]], finished_once: Path
) -> None:
    place, process = long_run
    process.kill()
    process.communicate()
    opened = open_run_of(place)
    job = opened.job
    run_pipeline(opened, "train")
    killed = (job.folder / "train" / "adapter" / "adapters.safetensors").read_bytes()
    (untouched,) = finished_once.glob("runs/*/train/adapter/adapters.safetensors")
    assert killed == untouched.read_bytes(), "checkpoints more often change nothing either"


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_a_message(place: Path) -> None:
    """A limit on file sizes stands in for a full disk: a real write fails in a real process."""
    run_pipeline(open_run_of(place), "preflight")
    command = (
        f"ulimit -f 24; exec {sys.executable} -m mlx_ft run r.yaml"  # 24 blocks of 1,024 bytes
    )
    done = subprocess.run(
        ["bash", "-c", command], cwd=place, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "cannot be written" in done.stderr
    job = job_of(place)
    assert read_json(job.folder / "run.json")["status"] == "failed"
    assert not (job.folder / "train").exists() and not (job.folder / "export").exists()


def test_stages_in_the_documented_order() -> None:
    names = ["data", "preflight", "base", "train", "export", "eval"]
    assert [stage.name for stage in STAGES] == names == list(STAGE_NAMES)


def test_a_gate_that_fails_stops_a_run_and_another_limit_asks_nothing_again(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers of the finished run are judged anew; no model is loaded."""

    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("mlx_ft.engine.load.load_model", never)
    (suite,) = read_json(next((finished / "runs").iterdir()) / "eval" / "results.json")["suites"]
    run = job_of(finished).folder
    failing_run = open_run_of(finished, f'eval.gates={{{suite}.mean: "> 1"}}')
    failing = failing_run.job
    assert failing.folder == run, "a gate makes no other run"
    with pytest.raises(GateFailed, match=f"gate {suite}.mean"):
        run_pipeline(failing_run, stages=[stage for stage in STAGES if stage.name == "eval"])
    assert read_json(run / "run.json")["status"] == "gate_failed"
    assert f"{suite}.quantized.mean" in (run / "report.html").read_text(encoding="utf-8")
    holding_run = open_run_of(finished, f'eval.gates={{{suite}.mean: ">= 0"}}')
    run_pipeline(holding_run, stages=[stage for stage in STAGES if stage.name == "eval"])
    assert read_json(run / "run.json")["status"] == "done"
    (gate,) = (g for g in read_json(run / "eval" / "results.json")["gates"])
    assert gate["passed"] and gate["limit"] == ">= 0"


def test_a_gate_on_a_suite_that_is_not_measured_is_found_before_anything_is(place: Path) -> None:
    with pytest.raises(InputError, match=r"eval\.gates\.nothing\.mean: no suite 'nothing'"):
        job_of(place, 'eval.gates={nothing.mean: "> 0.5"}')
    assert not (place / "runs").exists()
