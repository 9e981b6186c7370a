"""A suite is read exactly or refused with every fault, each where it is."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_ft.errors import DataError
from mlx_ft.evaluate.scorers.text import Choice, Contains, Exact, Regex, Talk
from mlx_ft.evaluate.scorers.tool_calls import WrappedCall
from mlx_ft.evaluate.suites import load_suite, load_suites
from tests.support.paths import ROOT

TALK_YAML = """\
name: chat
description: a few words
samples: chat.jsonl
scorer:
  name: talk
  forbid: [execute_code]
max_tokens: 16
stop: ["<think>"]
"""


def sample(**changes: Any) -> dict[str, Any]:
    row = {
        "id": "a",
        "category": "greeting",
        "messages": [{"role": "user", "content": "Hello"}],
        "target": {"any_of": ["hello"]},
    }
    return {key: value for key, value in {**row, **changes}.items() if value is not None}


def write(folder: Path, rows: list[Any], text: str = TALK_YAML) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "chat.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    path = folder / "chat.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(path: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        load_suite(path)
    return [str(fault).replace(f"{path.parent}/", "") for fault in caught.value.faults]


def test_the_shipped_suites_are_complete() -> None:
    paths = sorted((ROOT / "evals").rglob("*.yaml"))
    suites = {suite.name: suite for suite in load_suites(paths)}
    assert len(suites) == len(paths) >= 2
    code_mode, keep_talking = suites["code_mode"], suites["keep_talking"]
    assert len(code_mode.samples) == 27
    assert len({each.category for each in code_mode.samples}) >= 5
    assert isinstance(code_mode.scorer, WrappedCall) and code_mode.scorer.wrapper == "execute_code"
    assert len(keep_talking.samples) >= 30
    assert isinstance(keep_talking.scorer, Talk) and "execute_code" in keep_talking.scorer.forbid
    for suite in suites.values():
        assert not suite.enable_thinking and "<think>" in suite.stop
        assert suite.description


def test_everything_in_the_files_arrives(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\u2028b ünï"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    rows = [sample(), "", sample(id="b", category=None, messages=history, tools=tools, weight=2)]
    suite = load_suite(write(tmp_path, rows))
    assert (suite.name, suite.max_tokens, suite.stop) == ("chat", 16, ("<think>",))
    assert suite.scorer == Talk(("execute_code",))
    first, second = suite.samples
    assert (first.id, first.category, first.tools, first.weight) == ("a", "greeting", None, 1.0)
    assert list(second.messages) == history and list(second.tools or ()) == tools
    assert (second.category, second.weight) == ("general", 2.0)


def test_an_answer_may_end_at_a_line_break(tmp_path: Path) -> None:
    text = TALK_YAML.replace('"<think>"', r'"\n"').replace("a few words", "|\n  two\n  lines")
    suite = load_suite(write(tmp_path, [sample()], text))
    assert suite.stop == ("\n",) and suite.description == "two\nlines\n"


def test_the_hash_covers_both_files(tmp_path: Path) -> None:
    path = write(tmp_path, [sample()])
    first = load_suite(path).file_sha256
    assert load_suite(path).file_sha256 == first
    write(tmp_path, [sample(id="b")])
    second = load_suite(path).file_sha256
    write(tmp_path, [sample()], TALK_YAML.replace("16", "17"))
    assert len({first, second, load_suite(path).file_sha256}) == 3


def test_all_faults_of_the_yaml_file_come_at_once_with_their_lines(tmp_path: Path) -> None:
    text = """\
nmae: chat
samples: chat.jsonl
scorer:
  name: wrapped_call
  wraper: execute_code
  tools: {}
max_tokens: "many"
enable_thinking: 1
"""
    faults = faults_of(write(tmp_path, [sample()], text))
    assert "chat.yaml:1: unknown key `nmae` - did you mean `name`?" in faults
    assert "chat.yaml: `name` is missing - add it" in faults
    assert any(f.startswith("chat.yaml:5: unknown key `scorer.wraper` - did you") for f in faults)
    assert any(f.startswith("chat.yaml:3: `scorer.wrapper` is missing") for f in faults)
    assert any(f.startswith("chat.yaml:6: `scorer.tools` is ") for f in faults)
    assert any(f.startswith("chat.yaml:7: `max_tokens` is 'many'") for f in faults)
    assert any(f.startswith("chat.yaml:8: `enable_thinking` is 1") for f in faults)
    assert len(faults) == 7


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: talk", "name: tlak", "chat.yaml:5: `scorer.name` is 'tlak' - did you mean `talk`?"),
        (
            "name: talk",
            "name: bleu",
            "use one of wrapped_call, tool_call, json, instructions, talk",
        ),
        ("  name: talk\n", "", "chat.yaml:4: `scorer.name` is null - "),
        ("max_tokens: 16", "max_tokens: 0", "chat.yaml:7: `max_tokens` is 0 - "),
        ("max_tokens: 16", "max_tokens: 16\nmax_tokens: 17", "chat.yaml:8"),
        (
            "name: talk\n  forbid: [execute_code]",
            "name: wrapped_call\n  wrapper: w\n  tools:\n    a b: [x]",
            "chat.yaml:8: `scorer.tools.a b` is 'a b' - ",
        ),
        ("name: chat", "name: ../chat", "chat.yaml:1: `name` is '../chat' - "),
        ("scorer:", "scorer: [", "chat.yaml:"),
        ("samples: chat.jsonl", "samples: other.jsonl", "chat.yaml:3: "),
        ('stop: ["<think>"]', 'stop: [""]', "chat.yaml:8: `stop.0` is ''"),
        ("stop:", "enable_thinking: true\nstop:", "stop ends every answer that thinks"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    faults = faults_of(write(tmp_path, [sample()], TALK_YAML.replace(old, new)))
    assert any(expected in fault for fault in faults), faults


def test_all_faults_of_the_samples_come_at_once_with_their_lines(tmp_path: Path) -> None:
    rows: list[Any] = [
        sample(),
        '{"id": "b"',
        sample(id="c", wieght=2.0),
        sample(id="d", messages="Hello"),
        sample(id="e", messages=[]),
        sample(id="f", messages=[{"role": "user", "content": "x"}, {"role": "assistant"}]),
        sample(id="g", messages=[{"role": "user", "content": "x", "text": "y"}]),
        sample(id="h", messages=[{"role": "assistant", "content": "x"}]),
        sample(id="i", target={"any": ["x"]}),
        sample(id="j", target=None),
        sample(id="k", target={"min_words": 9, "max_words": 3}),
        sample(id="l", weight=0),
        sample(),
        sample(id="\x1b[31m"),
        '{"id": "m", "id": "n"}',
        '{"id": "o", "weight": NaN}',
        "[" * 100_000,
        "7",
        sample(id="p", weight=True),
    ]
    faults = faults_of(write(tmp_path, rows))
    lines = [int(fault.split(":")[1]) for fault in faults]
    assert sorted(set(lines)) == list(range(2, len(rows) + 1)), faults
    assert "chat.jsonl:3: unknown key `wieght` - did you mean `weight`?" in faults
    assert "chat.jsonl:9: unknown key `target.any` - did you mean `any_of`?" in faults
    assert "chat.jsonl:10: `target` is missing - add it" in faults
    assert any(fault.startswith("chat.jsonl:13: id 'a' is also on line 1") for fault in faults)
    assert all("\x1b" not in fault for fault in faults)


@pytest.mark.parametrize(
    ("scorer", "right", "built", "wrong"),
    [
        (
            "{name: wrapped_call, wrapper: run, tools: {f: [x]}}",
            {"calls": [{"name": "f", "arguments": {"x": 1}}]},
            WrappedCall("run", {"f": ("x",)}),
            [
                {"calls": []},
                {"calls": [{"name": "g", "arguments": {"x": 1}}]},
                {"calls": [{"name": "f", "arguments": {"y": 1}}]},
                {"calls": [{"name": "f", "arguments": {"x": [1]}}]},
                {"calls": [{"name": "f", "arguments": {"x": 1}, "id": 3}]},
            ],
        ),
        ("{name: exact}", {"text": "4"}, Exact(), [{"text": 4}, {"text": ""}, {}]),
        ("{name: contains}", {"all_of": ["4"]}, Contains(), [{}, {"any_of": "4"}]),
        ("{name: regex, ignore_case: true}", {"pattern": "x+"}, Regex(True), [{"pattern": "("}]),
        ("{name: choice, choices: [A, B]}", {"choice": "B"}, Choice(("A", "B")), [{"choice": "C"}]),
    ],
)
def test_each_scorer_has_its_own_targets(
    tmp_path: Path, scorer: str, right: Any, built: Any, wrong: list[Any]
) -> None:
    text = f"name: chat\nsamples: chat.jsonl\nmax_tokens: 4\nscorer: {scorer}\n"
    suite = load_suite(write(tmp_path, [sample(target=right)], text))
    assert suite.scorer == built
    for target in wrong:
        faults = faults_of(write(tmp_path, [sample(target=target)], text))
        assert all(fault.startswith("chat.jsonl:1: ") for fault in faults), faults


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    assert "does not exist" in faults_of(tmp_path / "none.yaml")[0]
    path = write(tmp_path, [])
    assert "has no samples" in faults_of(path)[0]
    (tmp_path / "chat.jsonl").write_bytes(b"\xff\xfe{}")
    assert "not UTF-8" in faults_of(path)[0]
    path.write_text("just a text", encoding="utf-8")
    faults_of(path)


def test_faults_of_several_suites_come_together(tmp_path: Path) -> None:
    good = write(tmp_path, [sample()])
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: bad", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_suites([good, bad, good, tmp_path / "none.yaml"])
    text = str(caught.value)
    assert "bad.yaml" in text and "none.yaml" in text and "a second suite called chat" in text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=80), st.text(max_size=80))
def test_any_text_is_read_or_refused(tmp_path: Path, key: str, line: str) -> None:
    try:
        path = write(tmp_path, [line], TALK_YAML + key)
    except UnicodeEncodeError:
        return
    with pytest.raises(DataError):
        load_suite(path)
