"""lm-evaluation-harness asks our models through the chat template, or is told why it cannot."""

import io
import json
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from mlx_ft.engine.generate import generate
from mlx_ft.engine.likelihood import likelihoods
from mlx_ft.engine.load import load_model
from mlx_ft.errors import DataError, InputError, RunError
from mlx_ft.evaluate.lm_eval import Tasks, require_lm_eval, require_models, run_tasks, task_rows
from mlx_ft.evaluate.targets import read_targets
from mlx_ft.model.chat import ChatFormat
from mlx_ft.system.console import Console
from tests.support.models import write_tiny_model

INSTALLED = util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason="needs lm-evaluation-harness")
QUESTIONS = ("hello", "what is the capital of France?", "files and tests", "how are you")
CHOICES = ("Paris", "the quick brown fox", "fine")
TASKS = {
    "choose": """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "say": """
task: say
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: said
generation_kwargs: {until: ["@@@@"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "plain": """
task: plain
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity}]
""",
}


def test_without_the_extra_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install 'mlx-ft\[lm-eval\]'"):
        require_lm_eval()


def test_a_server_cannot_be_asked_tasks() -> None:
    require_models(None)
    with pytest.raises(InputError, match="log-probabilities"):
        require_models("http://127.0.0.1/v1")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, and tasks whose right answers are what it says by our own functions."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = write_tiny_model(tmp_path / "model")
    loaded = load_model(folder, ChatFormat())
    renderer = loaded.renderer
    prompts = [renderer.prompt_ids([{"role": "user", "content": text}]) for text in QUESTIONS]
    said = generate(loaded, prompts, max_tokens=6)
    rows: list[dict[str, Any]] = []
    for question, prompt, answer in zip(QUESTIONS, prompts, said, strict=True):
        ids = [renderer.tokenizer.encode(text, add_special_tokens=False) for text in CHOICES]
        found = likelihoods(loaded, [prompt] * len(CHOICES), ids)
        sums = [sum(each.log_probabilities) for each in found]
        label = sums.index(max(sums))
        row = {"question": question, "choices": CHOICES, "label": label, "said": answer.text}
        rows.append(row)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    for name, text in TASKS.items():
        data = json.dumps(str(tmp_path / "data.jsonl"))
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.replace("DATA", data))
    return tmp_path


def ask(place: Path, *names: str) -> dict[str, Any]:
    targets = read_targets(
        [str(place / "model")],
        enable_thinking=None,
        default=ChatFormat(),
        console=Console(),
    )
    tasks = Tasks(names, include=place / "tasks", batch_size=3)
    return run_tasks(tasks, targets, place / "out", Console(io.StringIO()))


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")  # other people's code
def test_tasks_hear_what_the_model_says_through_its_template(place: Path) -> None:
    """Each row's right answer is our own: any other prompt or score would not find all of them."""
    results = ask(place, "choose", "say")
    rows = {(task, metric): value for _, task, metric, value in task_rows(results)}
    assert rows["choose", "acc"] == "1.000"
    assert rows["say", "exact_match"] == "1.000"
    (found,) = results.values()
    assert found["template"] == "own" and found["n-samples"]["say"]["effective"] == len(QUESTIONS)
    path = place / "out" / "lm_eval" / "model.json"
    written = path.read_bytes()
    assert ask(place, "choose", "say") == results and path.read_bytes() == written


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")  # other people's code
def test_plain_text_is_refused(place: Path) -> None:
    with pytest.raises(DataError, match="plain text"):
        ask(place, "plain")
    with pytest.raises(DataError, match="lm-eval no_such_task"):
        ask(place, "no_such_task")
