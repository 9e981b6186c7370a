"""The quickstart's data and its two suites hold together.

Invariants: make_data.py reproduces the committed files; every tool row calls only declared tools
with exactly their arguments, copied from the request; training and evaluation share neither
wording nor values. "No shared wording": no run of five words in common between a code_mode prompt
and a tool request, values masked and the mask counted as a word; no run of six words, and no equal
prompt, for talk. "No shared values": no argument of a target occurs anywhere in the data, nor does
the last part of its path.
"""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

DATA = ROOT / "recipes" / "data" / "code_mode"
EVALS = ROOT / "evals"
WRAPPED = re.compile(r'execute_code\("""(.*)"""\)', re.DOTALL)
MASK = "VALUE"
PRINT_TOOLS = (
    "import dataclasses, json, make_data; "
    "print(json.dumps([dataclasses.asdict(tool) for tool in make_data.TOOLS]))"
)
Json = dict[str, Any]
Call = tuple[str, dict[str, str]]


def read_jsonl(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


TRAIN = read_jsonl(DATA / "train.jsonl")
VALID = read_jsonl(DATA / "valid.jsonl")
ROWS = TRAIN + VALID
TOOL_ROWS = [row for row in ROWS if row["category"] != "talk"]
TALK_ROWS = [row for row in ROWS if row["category"] == "talk"]
SUITE = yaml.safe_load((EVALS / "code_mode.yaml").read_text(encoding="utf-8"))
SAMPLES = read_jsonl(EVALS / "code_mode.jsonl")
TALK_SUITE = yaml.safe_load((EVALS / "keep_talking.yaml").read_text(encoding="utf-8"))
TALK_SAMPLES = read_jsonl(EVALS / "keep_talking.jsonl")
TOOLS: dict[str, list[str]] = SUITE["scorer"]["tools"]


def calls_of(row: Json) -> list[Call]:
    """The calls of a row's answer; fails unless it is wrapped calls with constant arguments."""
    answer = row["messages"][-1]["content"]
    match = WRAPPED.fullmatch(answer)
    assert match, answer
    assert isinstance(ast.parse(answer, mode="eval").body, ast.Call), answer
    calls = []
    for statement in ast.parse(match[1]).body:
        assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call), answer
        call = statement.value
        assert isinstance(call.func, ast.Name) and not call.args, answer
        calls.append((call.func.id, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}))
    return calls


def request_of(row: Json) -> str:
    return str(row["messages"][-2]["content"])


def target_calls(sample: Json) -> list[Call]:
    return [(call["name"], call["arguments"]) for call in sample["target"]["calls"]]


def values_of(calls: list[Call]) -> set[str]:
    return {value for _, arguments in calls for value in arguments.values()}


def masked(text: str, values: set[str]) -> str:
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, f" {MASK} ")
    return text


def word_runs(text: str, length: int) -> set[tuple[str, ...]]:
    """All runs of `length` words, lower case, punctuation dropped."""
    words = re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def last_component(value: str) -> str:
    return value.rstrip("/").split("/")[-1]


def make_data(seed: int, out: Path) -> None:
    script = str(DATA / "make_data.py")
    command = [sys.executable, "-B", script, "--seed", str(seed), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)


def test_make_data_reproduces_the_committed_files(tmp_path: Path) -> None:
    make_data(0, tmp_path)
    for name in ("train.jsonl", "valid.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_another_seed_gives_other_rows(tmp_path: Path) -> None:
    make_data(1, tmp_path)
    assert (tmp_path / "train.jsonl").read_bytes() != (DATA / "train.jsonl").read_bytes()


def test_rows_are_alternating_turns_without_a_system_message() -> None:
    for row in ROWS:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2), row
        assert all(
            message["content"].strip() == message["content"] != "" for message in row["messages"]
        )


def test_counts() -> None:
    assert 300 <= len(TRAIN) <= 600
    assert 30 <= len(VALID) <= 60
    for rows in (TRAIN, VALID):
        share = sum(row["category"] != "talk" for row in rows) / len(rows)
        assert 0.6 <= share <= 0.72


def test_every_tool_row_calls_known_tools_with_exactly_their_arguments() -> None:
    for row in TOOL_ROWS:
        calls = calls_of(row)
        assert len(calls) == (2 if row["category"] == "multi_step" else 1), row
        for name, arguments in calls:
            assert list(arguments) == TOOLS[name], row


def test_every_argument_is_copied_from_the_request() -> None:
    for row in TOOL_ROWS:
        assert all(value in request_of(row) for value in values_of(calls_of(row))), row


def test_every_tool_has_rows_and_wordings() -> None:
    rows: Counter[str] = Counter()
    wordings: dict[str, set[str]] = {name: set() for name in TOOLS}
    for row in TRAIN:
        if row["category"] in ("talk", "multi_step"):
            continue
        ((name, arguments),) = calls_of(row)
        rows[name] += 1
        wordings[name].add(masked(request_of(row), set(arguments.values())))
    for name in TOOLS:
        assert rows[name] >= 20, name
        assert len(wordings[name]) >= 18, name


def test_talk_rows_never_mention_the_wrapper() -> None:
    for row in TALK_ROWS:
        assert all("execute_code" not in message["content"] for message in row["messages"]), row


def test_no_duplicates() -> None:
    conversations = Counter(json.dumps(row["messages"]) for row in ROWS)
    assert conversations.most_common(1)[0][1] == 1
    requests = Counter(" ".join(m["content"] for m in row["messages"][:-1]).lower() for row in ROWS)
    assert requests.most_common(1)[0][1] == 1


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: str(sample["id"]))
def test_no_value_of_a_code_mode_target_occurs_in_the_data(sample: Json) -> None:
    text = "\n".join(message["content"] for row in ROWS for message in row["messages"])
    known = {last_component(value) for row in TOOL_ROWS for value in values_of(calls_of(row))}
    for value in values_of(target_calls(sample)):
        assert value not in text
        assert last_component(value) not in known


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: str(sample["id"]))
def test_no_five_words_of_a_code_mode_prompt_occur_in_a_tool_request(sample: Json) -> None:
    prompt = sample["messages"][-1]["content"]
    runs = word_runs(masked(prompt, values_of(target_calls(sample))), 5)
    for row in TOOL_ROWS:
        request = request_of(row)
        shared = runs & word_runs(masked(request, values_of(calls_of(row))), 5)
        assert not shared, (prompt, request)


@pytest.mark.parametrize("sample", TALK_SAMPLES, ids=lambda sample: str(sample["id"]))
def test_no_keep_talking_prompt_occurs_in_the_data(sample: Json) -> None:
    prompt = sample["messages"][-1]["content"]
    runs = word_runs(prompt, 6)
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    for row in ROWS:
        for message in row["messages"]:
            if message["role"] == "user":
                assert re.findall(r"[a-z0-9]+", message["content"].lower()) != words, prompt
                assert not runs & word_runs(message["content"], 6), (prompt, message["content"])


@pytest.mark.parametrize(
    ("suite", "samples", "least_samples", "least_categories"),
    [(SUITE, SAMPLES, 27, 5), (TALK_SUITE, TALK_SAMPLES, 120, 7)],
    ids=["code_mode", "keep_talking"],
)
def test_suites_are_complete(
    suite: Json, samples: list[Json], least_samples: int, least_categories: int
) -> None:
    assert set(suite) - {"margin"} == {
        "name", "description", "samples", "scorer", "max_tokens", "enable_thinking", "stop", "tags"
    }  # fmt: skip
    assert (EVALS / suite["samples"]).is_file()
    assert suite["enable_thinking"] is False and "<think>" in suite["stop"]
    assert f"{len(samples)} " in suite["description"]
    assert len(samples) >= least_samples
    assert len({sample["id"] for sample in samples}) == len(samples)
    assert len({sample["messages"][-1]["content"].lower() for sample in samples}) == len(samples)
    assert len({sample["category"] for sample in samples}) >= least_categories
    for sample in samples:
        assert set(sample) == {"id", "category", "messages", "target"}
        assert [message["role"] for message in sample["messages"]] == ["user"]


def test_code_mode_targets_fit_the_tools_and_are_named_in_the_prompt() -> None:
    used = Counter(name for sample in SAMPLES for name, _ in target_calls(sample))
    assert set(used) == set(TOOLS)
    for sample in SAMPLES:
        for name, arguments in target_calls(sample):
            assert list(arguments) == TOOLS[name], sample
            assert all(value in sample["messages"][0]["content"] for value in arguments.values()), (
                sample
            )


def test_suite_declares_the_tools_that_the_data_uses() -> None:
    command = [sys.executable, "-B", "-c", PRINT_TOOLS]
    printed = subprocess.run(command, check=True, capture_output=True, cwd=DATA).stdout
    declared = {tool["name"]: tool["arguments"] for tool in json.loads(printed)}
    assert declared == TOOLS


def test_keep_talking_targets_are_usable() -> None:
    for sample in TALK_SAMPLES:
        target = sample["target"]
        assert set(target) == {"any_of", "min_words", "max_words"}, sample
        assert all(text == text.lower().strip() != "" for text in target["any_of"]), sample
        assert 1 <= target["min_words"] < target["max_words"]
        assert not any("execute_code" in text for text in target["any_of"])


def test_the_first_forty_talk_prompts_hold_every_category_as_all_do() -> None:
    """A recipe may ask only the first (`eval.limit`)."""
    shares = [
        Counter(sample["category"] for sample in part) for part in (TALK_SAMPLES[:40], TALK_SAMPLES)
    ]
    few, all_of_them = shares
    assert set(few) == set(all_of_them)
    for category, count in all_of_them.items():
        assert abs(few[category] / 40 - count / len(TALK_SAMPLES)) <= 0.08, category
    assert max(few.values()) <= 2 * min(few.values())
