"""Every model is asked every question once, whatever interrupts, and only as it was trained."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import llama

from mlx_ft.engine.device import configure_backend
from mlx_ft.engine.generate import generate
from mlx_ft.engine.load import LoadedModel
from mlx_ft.errors import DataError, ModelError
from mlx_ft.evaluate.chat_fingerprint import thinking_faults
from mlx_ft.evaluate.harness import (
    ColumnResult,
    cut_at_stop,
    evaluate,
    evaluate_column,
    without_thinking,
)
from mlx_ft.evaluate.suites import Suite
from mlx_ft.model.chat import ChatRenderer
from tests.support.harnesses import (
    MODEL,
    QUESTIONS,
    Columns,
    Scripted,
    column_of,
    evaluate_all,
    fine,
    make_suite,
    renderer_of,
)
from tests.support.narration import SeenProgress
from tests.support.paths import ROOT
from tests.support.tokenizers import CHATML_TEMPLATE, write_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def renderer(tokenizer_folder: Path) -> ChatRenderer:
    return renderer_of(tokenizer_folder)


@pytest.fixture
def loaded(renderer: ChatRenderer) -> LoadedModel:
    """A random Llama of two layers; tests of mechanics only use its renderer."""
    configure_backend()
    mx.random.seed(3)
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(renderer.tokenizer),
        "tie_word_embeddings": True,
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    return LoadedModel(model, renderer, config, "float32")


def ask(
    suite: Suite,
    loaded: LoadedModel,
    folder: Path,
    asked: Any,
    *,
    model_sha256: str = MODEL,
    column: str = "base",
) -> ColumnResult:
    made = column_of(loaded, asked, name=column, sha256=model_sha256)
    (result,) = evaluate_column([suite], made, folder, progress=SeenProgress())
    return result


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_seconds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_real_model_answers_every_sample_through_its_template(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    suite = make_suite()
    result = ask(suite, loaded, tmp_path, "model")
    rows = lines_of(tmp_path / "chat" / "base.jsonl")
    assert list(result.records) == rows and result.generated == len(QUESTIONS)
    assert [row["id"] for row in rows] == [sample.id for sample in suite.samples]
    for row, sample in zip(rows, suite.samples, strict=True):
        assert 0 <= row["generated_tokens"] <= suite.max_tokens
        assert row["finish_reason"] in ("stop", "length")
        prompt = loaded.renderer.prompt_ids(sample.messages)
        (direct,) = generate(loaded, [prompt], max_tokens=suite.max_tokens)
        assert row["text"] == direct.text
    assert result.summary["n"] == len(QUESTIONS)


def test_a_line_says_all_about_its_sample(loaded: LoadedModel, tmp_path: Path) -> None:
    result = ask(make_suite(), loaded, tmp_path, Scripted(fine))
    row = dict(result.records[2])
    assert len(row.pop("key")) == 64 and row.pop("seconds") >= 0
    assert row == {
        "id": "q2",
        "category": "even",
        "weight": 1.0,
        "messages": [{"role": "user", "content": "how are you"}],
        "target": {"any_of": ["fine"]},
        "text": "I am fine.",
        "source": None,
        "flags": [],
        "finish_reason": "stop",
        "generated_tokens": len(loaded.renderer.tokenizer.encode("I am fine.")),
        "score": 1.0,
        "answer": "fine",
        "reason": "says 'fine'",
        "failure": None,
    }
    assert (result.summary["mean"], result.summary["failures"]) == (0.2, {"wrong_answer": 4})
    assert list(result.summary["by_category"]) == ["even", "odd"]
    assert len(result.path.read_text(encoding="utf-8").splitlines()) == 5, "one line a sample"


def test_an_interrupted_column_goes_on_where_it_stopped(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    suite = make_suite()
    whole = ask(suite, loaded, tmp_path / "whole", Scripted(fine))
    with pytest.raises(KeyboardInterrupt):
        ask(suite, loaded, tmp_path / "parts", Scripted(fine, limit=3))
    path = tmp_path / "parts" / "chat" / "base.jsonl"
    assert [row["id"] for row in lines_of(path)] == ["q4", "q3", "q2"]
    rest = Scripted(fine)
    result = ask(suite, loaded, tmp_path / "parts", rest)
    assert (result.generated, result.reused, len(rest.prompts)) == (2, 3, 2)
    assert without_seconds(lines_of(path)) == without_seconds(list(whole.records))
    assert result.summary == whole.summary


@pytest.mark.parametrize("cut_bytes", [2, 7, 60])
@pytest.mark.parametrize("rest", [b"", b"\x00" * 32, b"\nnot json\n{}\n"])
def test_a_torn_last_line_is_asked_again(
    loaded: LoadedModel, tmp_path: Path, cut_bytes: int, rest: bytes
) -> None:
    suite = make_suite()
    whole = ask(suite, loaded, tmp_path, Scripted(fine))
    whole.path.write_bytes(whole.path.read_bytes()[:-cut_bytes] + rest)
    again = Scripted(fine)
    result = ask(suite, loaded, tmp_path, again)
    assert len(again.prompts) == 1
    assert without_seconds(lines_of(whole.path)) == without_seconds(list(whole.records))
    assert result.reused == 4


def test_a_killed_process_loses_nothing_that_was_answered(
    tokenizer_folder: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    script = f"""
import os, signal
from pathlib import Path
import mlx.nn as nn
from mlx_ft.engine.load import LoadedModel
from tests.evaluate.test_harness import ask
from tests.support.harnesses import Scripted, fine, make_suite, renderer_of
class Killed(Scripted):
    def answer_all(self, prompt):
        if len(self.prompts) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return fine(prompt)
killed = Killed(fine)
killed.say = killed.answer_all
loaded = LoadedModel(nn.Module(), renderer_of(Path({str(tokenizer_folder)!r})), {{}}, "")
ask(make_suite(), loaded, Path({str(tmp_path)!r}), killed)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert len(lines_of(tmp_path / "chat" / "base.jsonl")) == 3
    rest = Scripted(fine)
    assert ask(make_suite(), loaded, tmp_path, rest).reused == 3
    assert len(rest.prompts) == 2


def test_answers_are_kept_only_while_nothing_that_made_them_changes(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    suite = make_suite()
    ask(suite, loaded, tmp_path, Scripted(fine))
    first, *others = suite.samples
    asked_anew = {
        "nothing": (suite, MODEL, 0),
        "description": (replace(suite, description="other", tags=("x",)), MODEL, 0),
        "weight": (replace(suite, samples=(replace(first, weight=2.0), *others)), MODEL, 0),
        "one sample less": (replace(suite, samples=tuple(others)), MODEL, 0),
        "max_tokens": (replace(suite, max_tokens=9), MODEL, 5),
        "stop": (replace(suite, stop=()), MODEL, 5),
        "scorer": (replace(suite, scorer_config={"name": "talk", "forbid": []}), MODEL, 5),
        "model": (suite, "1" * 64, 5),
        "target": (replace(suite, samples=(replace(first, target={}), *others)), MODEL, 1),
        "prompt": (
            replace(suite, samples=(replace(first, messages=others[0].messages), *others)),
            MODEL,
            1,
        ),
    }
    kept = (tmp_path / "chat" / "base.jsonl").read_bytes()
    for name, (changed, model_sha256, expected) in asked_anew.items():
        (tmp_path / "chat" / "base.jsonl").write_bytes(kept)
        generator = Scripted(fine)
        result = ask(changed, loaded, tmp_path, generator, model_sha256=model_sha256)
        assert len(generator.prompts) == expected, name
        assert [row["id"] for row in result.records] == [sample.id for sample in changed.samples]
        assert [row["weight"] for row in result.records] == [s.weight for s in changed.samples], (
            name
        )


def always(said: str) -> Callable[[str], str]:
    """Return a rule that gives the same answer to every question."""
    return lambda _: said


def test_a_stop_text_ends_the_answer_before_it(loaded: LoadedModel, tmp_path: Path) -> None:
    suite = make_suite(stop=("END", "<|endoftext|>"))
    for name, said in {"text": "fine END fine", "token": "fine <|endoftext|>fine"}.items():
        result = ask(suite, loaded, tmp_path, Scripted(always(said)), column=name)
        assert {row["text"] for row in result.records} == {"fine "}
        assert {row["finish_reason"] for row in result.records} == {"stop_text"}
        assert result.summary["mean"] == 1.0


@pytest.mark.parametrize("said", ["<think>hm</think> fine", "fine <think>", "hm</think> fine"])
@pytest.mark.parametrize("stop", [("<think>",), ()])
@pytest.mark.parametrize("as_token", [False, True])
def test_thinking_aloud_is_counted_even_as_a_control_token(
    tokenizer_folder: Path, tmp_path: Path, said: str, stop: tuple[str, ...], as_token: bool
) -> None:
    renderer = renderer_of(tokenizer_folder)
    if as_token:
        special = {"additional_special_tokens": ["<think>", "</think>"]}
        renderer.tokenizer.add_special_tokens(special)
    loaded = LoadedModel(nn.Module(), renderer, {}, "")
    result = ask(make_suite(stop=stop), loaded, tmp_path, Scripted(lambda _: said))
    assert result.summary["failures"] == {"thinking_leak": 5}
    if stop and said.startswith("<think>"):
        assert {(row["text"], row["finish_reason"]) for row in result.records} == {
            ("", "stop_text")
        }


def test_a_suite_that_thinks_is_scored_on_what_follows(loaded: LoadedModel, tmp_path: Path) -> None:
    suite = make_suite(enable_thinking=True, stop=())
    result = ask(suite, loaded, tmp_path, Scripted(lambda _: "<think>hm</think>I am fine"))
    assert result.summary["mean"] == 1.0
    result = ask(suite, loaded, tmp_path, Scripted(lambda _: "<think>fine"), column="adapter")
    assert result.summary["failures"] == {"thinking_leak": 5}, "thinking that never ends"


def test_a_loop_is_told_by_its_tokens(loaded: LoadedModel, tmp_path: Path) -> None:
    result = ask(make_suite(), loaded, tmp_path, Scripted(lambda _: "fine " + "(0) " * 60))
    assert result.summary["failures"] == {"loop": 5}


def test_cutting_and_thinking_are_plain_text_rules() -> None:
    assert cut_at_stop("abcXdY", ["Y", "X"]) == ("abc", "X")
    assert cut_at_stop("abc", ["X"]) == ("abc", None)
    assert without_thinking("<think>a</think>b</think> c") == " c"
    assert without_thinking("no thoughts") == "no thoughts"


def test_a_sample_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path / "strict")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["chat_template"] = CHATML_TEMPLATE.replace("'system', ", "")
    path.write_text(json.dumps(config), encoding="utf-8")
    loaded = LoadedModel(nn.Module(), renderer_of(folder), {}, "")
    suite = make_suite()
    system = ({"role": "system", "content": "Be brief."}, *suite.samples[1].messages)
    refused = replace(suite.samples[1], messages=system)
    changed = replace(suite, samples=(suite.samples[0], refused))
    with pytest.raises(DataError, match="suite chat, sample q1: the chat template refuses it"):
        ask(changed, loaded, tmp_path, Scripted(fine))
    assert not (tmp_path / "chat").exists()


def test_a_bare_string_is_not_a_prompt(loaded: LoadedModel, tmp_path: Path) -> None:
    suite = make_suite()
    bare = replace(suite.samples[0], messages="hello")  # type: ignore[arg-type]  # what is refused
    with pytest.raises(TypeError):
        ask(replace(suite, samples=(bare,)), loaded, tmp_path, Scripted(fine))


def test_each_model_is_opened_once_and_let_go(renderer: ChatRenderer, tmp_path: Path) -> None:
    suites = [make_suite("chat"), make_suite("talk", max_tokens=4)]
    columns = Columns(renderer)
    results = evaluate_all(suites, columns, tmp_path, Scripted(fine))
    assert columns.opened == ["base", "quantized"]
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results
    assert list(results["suites"]) == list(results["suite_info"]) == ["chat", "talk"]
    for suite in results["suites"].values():
        assert list(suite) == ["base", "quantized"]
        assert suite["base"]["mean"] == suite["quantized"]["mean"] == 0.2
    assert results["suite_info"]["talk"]["max_tokens"] == 4
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert written == [
        "chat/base.jsonl",
        "chat/quantized.jsonl",
        "results.json",
        "talk/base.jsonl",
        "talk/quantized.jsonl",
    ]


def test_progress_adds_up_all_suites_and_columns(renderer: ChatRenderer, tmp_path: Path) -> None:
    suites, progress = [make_suite("chat"), make_suite("talk")], SeenProgress()
    columns, count = Columns(renderer).columns(Scripted(fine)), len(QUESTIONS)
    evaluate(suites, columns, tmp_path, progress=progress)
    assert [done for done, _ in progress.seen] == list(range(1, 4 * count + 1))
    texts = [text for _, text in progress.seen]
    assert set(texts[: 2 * count]) == {
        f"{suite}, base: {done} of {count} samples"
        for suite in ("chat", "talk")
        for done in range(1, count + 1)
    }
    (tmp_path / "talk" / "quantized.jsonl").unlink()
    again = SeenProgress()
    evaluate(suites, Columns(renderer).columns(Scripted(fine)), tmp_path, progress=again)
    assert again.seen[-1] == (count, f"talk, quantized: {count} of {count} samples")


def test_a_model_whose_answers_are_there_is_not_opened(
    renderer: ChatRenderer, tmp_path: Path
) -> None:
    suites = [make_suite("chat"), make_suite("talk")]
    first = evaluate_all(suites, Columns(renderer), tmp_path, Scripted(fine))
    columns = Columns(renderer)
    assert evaluate_all(suites, columns, tmp_path, Scripted(fine)) == first
    assert columns.opened == []
    (tmp_path / "talk" / "quantized.jsonl").unlink()
    rest = Scripted(fine)
    assert evaluate_all(suites, columns, tmp_path, rest) == first
    assert columns.opened == ["quantized"] and len(rest.prompts) == len(QUESTIONS)


def test_another_chat_format_than_the_trained_one_is_refused(
    renderer: ChatRenderer, tmp_path: Path
) -> None:
    suites = [make_suite()]
    trained = {**renderer.fingerprint(), "template_sha256": "0" * 64}
    columns = Columns(renderer)
    with pytest.raises(ModelError, match="template_sha256"):
        evaluate_all(suites, columns, tmp_path, Scripted(fine), fingerprint=trained)
    assert columns.opened == []

    folder = write_tiny_tokenizer(tmp_path / "other")
    path = folder / "tokenizer_config.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("assistant\\n", "assistant\\n "), encoding="utf-8")
    other, script = Columns(renderer_of(folder)), Scripted(fine)
    with pytest.raises(ModelError, match="base, chat fingerprint, template_sha256"):
        evaluate_all(suites, other, tmp_path, script, fingerprint=renderer.fingerprint())
    assert script.prompts == [] and other.opened == []


def test_a_suite_in_another_thinking_mode_is_refused(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    columns = Columns(renderer_of(tokenizer_folder, enable_thinking=True))
    with pytest.raises(DataError, match=r"suite chat: its enable_thinking is false"):
        evaluate_all([make_suite()], columns, tmp_path, Scripted(fine))
    with pytest.raises(DataError):
        evaluate_all([make_suite()], columns, tmp_path, Scripted(fine))
    assert thinking_faults([make_suite(enable_thinking=True)], False)
    assert not thinking_faults([make_suite()], False)
