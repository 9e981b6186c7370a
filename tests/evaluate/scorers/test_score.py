"""Each scorer keeps its written rule, on the shipped suites and on text that means harm."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.evaluate.scorers.combined import AllOf, AnyOf
from mlx_ft.evaluate.scorers.instructions import Instructions
from mlx_ft.evaluate.scorers.protocol import FAILURES, MAX_TEXT_CHARACTERS, Given, Score, Scorer
from mlx_ft.evaluate.scorers.score import score
from mlx_ft.evaluate.scorers.structured import Json
from mlx_ft.evaluate.scorers.text import (
    Choice,
    Contains,
    Exact,
    Numeric,
    Regex,
    Similarity,
    Talk,
    plain,
)
from mlx_ft.evaluate.scorers.tool_calls import ToolCall, WrappedCall
from mlx_ft.evaluate.suites import Sample, Suite, load_suite
from tests.support.paths import EVALS

CODE_MODE = load_suite(EVALS / "code_mode.yaml")
KEEP_TALKING = load_suite(EVALS / "keep_talking.yaml")

TOOLS = {"read_file": ("path",), "grep": ("pattern", "path"), "limit": ("lines", "strict")}
WRAPPED = WrappedCall("execute_code", TOOLS)
READ = {"calls": [{"name": "read_file", "arguments": {"path": "a/b.py"}}]}
GREP = {"calls": [{"name": "grep", "arguments": {"pattern": "x", "path": "src/"}}]}
TWO = {"calls": [*READ["calls"], *GREP["calls"]]}
LIMIT = {"calls": [{"name": "limit", "arguments": {"lines": -3, "strict": True}}]}


def python_of(target: dict[str, Any]) -> str:
    """The calls of a target as Python statements."""
    return "\n".join(
        f"{call['name']}({', '.join(f'{k}={v!r}' for k, v in call['arguments'].items())})"
        for call in target["calls"]
    )


def wrapped(code: str) -> str:
    return f'execute_code("""{code}""")'


def ideal_answer(suite: Suite, sample: Sample) -> str:
    """What a perfect model would say, made from the target alone."""
    if isinstance(suite.scorer, WrappedCall):
        return wrapped(python_of(dict(sample.target)))
    word = next(iter(sample.target.get("any_of", [])), "certainly")
    filler = " ".join(f"w{n}" for n in range(sample.target.get("min_words", 1) - 1))
    return f"{filler} {word}".strip()


def value_and_failure(scorer: Scorer, text: str, target: dict[str, Any]) -> tuple[float, Any]:
    judged = score(scorer, text, target)
    return judged.value, judged.failure


# --- the shipped suites


@pytest.mark.parametrize("suite", [CODE_MODE, KEEP_TALKING], ids=lambda suite: suite.name)
def test_the_ideal_answer_of_every_sample_scores_1(suite: Suite) -> None:
    for sample in suite.samples:
        judged = score(suite.scorer, ideal_answer(suite, sample), sample.target)
        assert (judged.value, judged.failure) == (1.0, None), (sample.id, judged)


def test_no_answer_of_another_code_mode_sample_scores_1() -> None:
    for sample in CODE_MODE.samples:
        for other in CODE_MODE.samples:
            if other.id != sample.id:
                judged = score(CODE_MODE.scorer, ideal_answer(CODE_MODE, other), sample.target)
                assert judged.value < 1.0, (sample.id, other.id)
                assert judged.failure in FAILURES


def test_no_answer_of_another_talk_sample_scores_1_unless_it_says_an_accepted_word() -> None:
    compared = 0
    for sample in KEEP_TALKING.samples:
        accepted = {plain(phrase) for phrase in sample.target.get("any_of", [])}
        for other in KEEP_TALKING.samples:
            answer = ideal_answer(KEEP_TALKING, other)
            if accepted and not any(f" {word} " in f" {plain(answer)} " for word in accepted):
                compared += 1
                judged = score(KEEP_TALKING.scorer, answer, sample.target)
                assert judged.value < 1.0, (sample.id, answer)
    assert compared > len(KEEP_TALKING.samples) * 20


def test_a_tool_call_is_never_talk_and_talk_is_never_a_tool_call() -> None:
    call = ideal_answer(CODE_MODE, CODE_MODE.samples[0])
    for sample in KEEP_TALKING.samples:
        words = " ".join(sample.target.get("any_of", []))
        assert value_and_failure(KEEP_TALKING.scorer, f"{words} {call}", dict(sample.target)) == (
            0.0,
            "forbidden_text",
        )
    for sample in CODE_MODE.samples:
        talk = "Sure, I will take care of that for you."
        assert value_and_failure(CODE_MODE.scorer, talk, dict(sample.target)) == (0.0, "prose")


# --- wrapped calls: what is 1, what is half, what is nothing


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ('execute_code("""read_file(path="a/b.py")""")', READ),
        ("  execute_code('read_file(\"a/b.py\")')\n", READ),
        ('result = execute_code("""\n    found = read_file(path="a/b.py")\n""")', READ),
        ('execute_code("""grep(path="src/", pattern="x")""")', GREP),
        ('execute_code("""grep("x", path="src/")""")', GREP),
        ('execute_code("""read_file("a/b.py")\ngrep("x", "src/")""")', TWO),
        ('execute_code("""read_file("a/b.py"); grep("x", "src/")""")', TWO),
        ('execute_code("""read_file("a/b.py")""")\nexecute_code("""grep("x", "src/")""")', TWO),
        ('execute_code("""# look\nread_file("a/b.py")""")', READ),
        ('execute_code("""limit(lines=-3, strict=True)""")', LIMIT),
        ('execute_code("""limit(-3.0, True)""")', LIMIT),
        (
            wrapped(f"read_file({'(' * 300!r})"),
            {"calls": [{**READ["calls"][0], "arguments": {"path": "(" * 300}}]},
        ),
    ],
)
def test_right_calls_in_the_wrapper_score_1(text: str, target: dict[str, Any]) -> None:
    assert value_and_failure(WRAPPED, text, target) == (1.0, None)


@pytest.mark.parametrize(
    "text",
    [
        'Sure! execute_code("""read_file(path="a/b.py")""")',
        'execute_code("""read_file(path="a/b.py")""")\nI hope this helps.',
        '```python\nexecute_code("""read_file(path="a/b.py")""")\n```',
        'execute_code("""print(read_file(path="a/b.py"))""")',
        'execute_code("""x = read_file(path="a/b.py")\nprint(x)""")',
        'execute_code("""import os\nread_file(path="a/b.py")""")',
        'print(execute_code("""read_file(path="a/b.py")"""))',
    ],
)
def test_right_calls_in_the_wrapper_with_more_around_them_score_half(text: str) -> None:
    assert value_and_failure(WRAPPED, text, READ) == (0.5, "extra_text")


@pytest.mark.parametrize(
    "text",
    [
        'read_file(path="a/b.py")',
        'You can use `read_file("a/b.py")` for that.',
        '```python\nread_file(path="a/b.py")\n```',
        '```\nread_file(path="a/b.py")',
        '{"name": "read_file", "arguments": {"path": "a/b.py"}}',
        '[{"name": "read_file", "parameters": {"path": "a/b.py"}}]',
        '{"function": {"name": "read_file", "arguments": "{\\"path\\": \\"a/b.py\\"}"}}',
        '{"tool_calls": [{"function": {"name": "read_file", "arguments": {"path": "a/b.py"}}}]}',
        '<tool_call>\n{"name": "read_file", "arguments": {"path": "a/b.py"}}\n</tool_call>',
        "<tool_call><function=read_file><parameter=path>\na/b.py\n</parameter></function>",
        '{"name": "execute_code", "arguments": {"code": "read_file(path=\\"a/b.py\\")"}}',
        'run_code("""read_file(path="a/b.py")""")',
        'execute_code(code="""read_file(path="a/b.py")""")',
        'execute_code(read_file(path="a/b.py"))',
        'execute_code("read_file(path="a/b.py")")',
        'execute_code("""read_file(path="a/b.py")',
        'execute_code(f"""read_file(path="a/b.py")""")',
    ],
)
def test_right_calls_in_another_wrapper_score_half(text: str) -> None:
    assert value_and_failure(WRAPPED, text, READ) == (0.5, "wrong_wrapper")


@pytest.mark.parametrize(
    ("text", "target", "failure"),
    [
        ('execute_code("""grep(pattern="a/b.py")""")', READ, "wrong_tool"),
        ('execute_code("""open_file(path="a/b.py")""")', READ, "wrong_tool"),
        ('{"name": "open_file", "arguments": {"path": "a/b.py"}}', READ, "wrong_tool"),
        ('execute_code("""read_file(path="a/c.py")""")', READ, "wrong_argument"),
        ('execute_code("""read_file(path=name)""")', READ, "wrong_argument"),
        ('execute_code("""read_file(path="a/" + "b.py")""")', READ, "wrong_argument"),
        ('execute_code("""read_file(path=None)""")', READ, "wrong_argument"),
        ('read_file(path="a/c.py")', READ, "wrong_argument"),
        ('execute_code("""limit(lines="-3", strict=True)""")', LIMIT, "wrong_argument"),
        ('execute_code("""limit(lines=-3, strict=1)""")', LIMIT, "wrong_argument"),
        ('execute_code("""read_file()""")', READ, "missing_argument"),
        ('execute_code("""grep(pattern="x")""")', GREP, "missing_argument"),
        ('execute_code("""read_file(file="a/b.py")""")', READ, "missing_argument"),
        ('execute_code("""read_file("a/b.py", "r")""")', READ, "unexpected_argument"),
        ('execute_code("""read_file("a/b.py", mode="r")""")', READ, "unexpected_argument"),
        ('execute_code("""read_file("a/b.py", path="a/b.py")""")', READ, "unexpected_argument"),
        ('execute_code("""read_file("a/b.py", **more)""")', READ, "unexpected_argument"),
        ('execute_code("""read_file(*["a/b.py"])""")', READ, "missing_argument"),
        ('execute_code("""read_file("a/b.py")\nread_file("a/b.py")""")', READ, "extra_call"),
        ('execute_code("""read_file("a/b.py")\ndelete("a/b.py")""")', READ, "extra_call"),
        ('execute_code("""read_file("a/b.py")""")', TWO, "missing_call"),
        ('execute_code("""""")', READ, "missing_call"),
        ('execute_code("""grep("x", "src/")\nread_file("a/b.py")""")', TWO, "wrong_order"),
        ('execute_code("""read_file(path="a/b', READ, "unparsable"),
        ('{"name": "read_file", "arguments"', READ, "unparsable"),
        ("```python\n", READ, "unparsable"),
        ("I cannot read files, but I can help.", READ, "prose"),
        ("read_file", READ, "prose"),
        ("<think>I should call it</think>" + wrapped('read_file("a/b.py")'), READ, "thinking_leak"),
        (wrapped('read_file("a/b.py")') + "<think>", READ, "thinking_leak"),
        ("", READ, "empty"),
        (" \n", READ, "empty"),
        ("read read " * 30, READ, "loop"),
        ('read_file("a/b.py") ' + "and then " * 40, READ, "loop"),
        ("x" * 10 + "y " * MAX_TEXT_CHARACTERS, READ, "too_large"),
    ],
)
def test_everything_else_scores_0_and_says_which_kind_it_is(
    text: str, target: dict[str, Any], failure: str
) -> None:
    assert value_and_failure(WRAPPED, text, target) == (0.0, failure)


def test_a_score_says_what_was_understood_and_why() -> None:
    judged = score(WRAPPED, wrapped('grep("y", "src/")'), GREP)
    assert judged.answer == 'grep(pattern="y", path="src/")'
    assert judged.reason == 'pattern is "y", not "x"'


def test_token_ids_tell_a_loop_that_the_text_hides() -> None:
    text = '["a", "a", "a"'
    assert score(WRAPPED, text, READ).failure == "unparsable"
    assert score(WRAPPED, text, READ, ids=[4, 5] * 30).failure == "loop"
    right = wrapped('read_file("a/b.py")')
    assert score(WRAPPED, right, READ, ids=[4, 5] * 30).value == 1.0


NAMES = st.sampled_from(sorted(TOOLS))
VALUES = st.text(max_size=20) | st.integers(-(10**9), 10**9) | st.booleans()


@st.composite
def targets(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(NAMES, min_size=1, max_size=3))
    return {
        "calls": [
            {"name": name, "arguments": {key: draw(VALUES) for key in TOOLS[name]}}
            for name in names
        ]
    }


@given(targets())
def test_any_calls_written_right_score_1_and_unwrapped_half(target: dict[str, Any]) -> None:
    code = python_of(target)
    assert value_and_failure(WRAPPED, f"execute_code({code!r})", target) == (1.0, None)
    assert value_and_failure(WRAPPED, f"result = execute_code({code!r})", target) == (1.0, None)
    bare = score(WRAPPED, code, target)
    as_json = score(WRAPPED, json.dumps(target["calls"]), target)
    assert {bare.value, as_json.value} == {0.5}
    assert {bare.failure, as_json.failure} == {"wrong_wrapper"}


@given(targets(), targets())
def test_other_calls_never_score_1(target: dict[str, Any], other: dict[str, Any]) -> None:
    judged = score(WRAPPED, f"execute_code({python_of(other)!r})", target)
    same = json.dumps(target, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (judged.value == 1.0) == same
    assert judged.value in (0.0, 1.0)


# --- hostile text

SCORERS: list[tuple[Scorer, dict[str, Any]]] = [
    (WRAPPED, READ),
    (Talk(("execute_code",)), {"any_of": ["paris"], "min_words": 1, "max_words": 20}),
    (Exact(), {"text": "4"}),
    (Contains(), {"any_of": ["4"], "all_of": ["2 + 2"]}),
    (Regex(), {"pattern": r"\b4\b"}),
    (Choice(("A", "B", "C")), {"choice": "B"}),
    (Regex(), {"pattern": r"(\(|\[|a|\w| )+=!$"}),
    (Numeric(take="only"), {"number": 17.25}),
    (Similarity(), {"references": ["Nobody would say this by accident, 17.25 times."]}),
    (Json({"type": "object", "required": ["a"]}), {"value": {"a": {"b": [1, 2]}}}),
    (ToolCall(), {"calls": [{"name": "read_file", "arguments": {"path": "zz"}}]}),
    (ToolCall("json", "given", True), {"calls": [{"name": "f", "arguments": {"x": [1]}}]}),
    (Instructions(), {"rules": {"max_words": 5, "language": "de", "json": True, "bullets": 77}}),
    (
        AllOf((Instructions(), Contains())),
        {"of": [{"rules": {"title": True}}, {"all_of": ["no such text"]}]},
    ),
    (AnyOf((Exact(), Numeric())), {"of": [{"text": "four"}, {"number": 17.25}]}),
]
FRAGMENTS = st.sampled_from(
    [
        "execute_code(",
        '"""',
        "read_file(",
        "path=",
        ")",
        "'a'",
        "\x00",
        "\x1b[31m",
        "<script>",
        "\ud800",
        "{",
        "[",
        '{"name":',
        "```python\n",
        "<tool_call>",
        "<function=read_file>",
        "</function>",
        "\\",
        "\n    ",
        "lambda:",
        "Paris",
        "B.",
        " ",
    ]
)


@pytest.mark.parametrize(("scorer", "target"), SCORERS, ids=lambda value: type(value).__name__)
@given(text=st.text(max_size=300) | st.lists(FRAGMENTS, max_size=40).map("".join))
def test_any_text_gets_a_score(scorer: Scorer, target: dict[str, Any], text: str) -> None:
    judged = score(scorer, text, target, None, Given(raw=text))
    assert 0 <= judged.value <= 1
    assert (judged.failure is None) == (judged.value == 1.0)
    assert judged == score(scorer, text, target, None, Given(raw=text))


HOSTILE = {
    "parentheses": "execute_code(" + "(" * 20_000,
    "closed parentheses": "execute_code(" + "(" * 200 + ")" * 200 + ")",
    "calls within calls": "read_file(path=" * 1500 + ")" * 1500,
    "many wrappers": 'execute_code("""' * 1500,
    "many calls": 'read_file("a/c.py"), ' * 1500,
    "brackets": "[" * 30_000,
    "objects": '{"name":' * 3000,
    "deep arrays": "[1," * 8000,
    "minus signs": "-" * 8000 + "1",
    "nots": "not " * 2000 + "x",
    "sums": "1+" * 4000 + "1",
    "attributes": "a." * 4000 + "b",
    "lambdas": "lambda:" * 1100 + "1",
    "conditions": "x if y else " * 600 + "1",
    "f-strings": "f'''{" * 2000,
    "assignments": "x:=" * 2000,
    "decorators": "@a\n" * 2500,
    "digits": "read_file(" + "1" * 5000 + ")",
    "indentation": "\n".join(" " * n + "if x:" for n in range(120)),
    "function tags": "</function>" + "<function=a>" * 2600,
    "parameter tags": "<function=a>" + "<parameter=b>" * 2400 + "</function>",
    "fences": "```\n" * 8000,
    "white space": "```" + " " * 30_000,
    "null bytes": 'execute_code("""read_file(path="\x00")""")',
    "surrogates": 'execute_code("""read_file(path="\ud800")""")',
    "bad escapes": 'execute_code("""read_file(path="\\d")""")',
    "huge": "a b " * 1_000_000,
    "nested JSON": '{"a":' * 3000 + "1" + "}" * 3000,
    "control characters": "".join(map(chr, range(1, 32))) * 500,
    "HTML": "<div onclick='x'>" * 1500 + "</div>" * 1500,
    "ANSI": "\x1b[31m\x1b]0;title\x07" * 2000,
    "minuses in a call": "<tool_call>" + "-" * 8000 + "</tool_call>",
    "braces in a call": "<|tool_call>call:a" + "{" * 4000,
    "braces, few deep": "<|tool_call>" + "call:a{b:{c:{" * 600,
    "arguments": "<tool_call>f" + "<arg_key>a</arg_key><arg_value>[" * 240,
    "tool marks": "<tool_call>" * 3000,
    "function names": "<function name=" + "<param name=" * 600,
    "commas": "1,234," * 5000,
    "sentences": "!" * 31 + ". ? " * 8000,
    "bullets": "- \n" * 9000,
    "one letter": "ab" * 16_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_neither_crashes_nor_hangs(name: str) -> None:
    started = time.process_time()  # whatever else runs on the machine
    for scorer, target in SCORERS:
        text = HOSTILE[name]
        assert score(scorer, text, target, None, Given(raw=text)).value < 1.0
    assert time.process_time() - started < 10


# --- the small scorers


@pytest.mark.parametrize(
    ("text", "value", "failure"),
    [
        ("Paris.", 1.0, None),
        ("The capital is\nPARIS!", 1.0, None),
        ("Comparison", 0.0, "wrong_answer"),
        ("I don\u2019t know", 1.0, None),
        ("new\n  york", 1.0, None),
        ("Yes.", 0.0, "wrong_answer"),
        ("Paris Execute_Code(", 0.0, "forbidden_text"),
        ("paris " * 20, 0.0, "loop"),
        ("Paris " + " ".join(f"word{n}" for n in range(30)), 0.0, "too_long"),
        ("<think>Paris", 0.0, "thinking_leak"),
        ("", 0.0, "empty"),
    ],
)
def test_talk(text: str, value: float, failure: str | None) -> None:
    target = {"any_of": ["paris", "new york", "don't know"], "max_words": 20}
    assert value_and_failure(Talk(("execute_code",)), text, target) == (value, failure)


def test_talk_without_accepted_words_takes_any_fluent_answer() -> None:
    assert value_and_failure(Talk(), "Yes.", {}) == (1.0, None)
    assert value_and_failure(Talk(), "Yes.", {"any_of": [], "min_words": 2}) == (0.0, "too_short")
    assert value_and_failure(Talk(), "Hotep " * 30, {}) == (0.0, "loop")


@pytest.mark.parametrize(
    ("scorer", "text", "target", "expected"),
    [
        (Exact(), " 42\n", {"text": "42"}, (1.0, None)),
        (Exact(), "42.", {"text": "42"}, (0.0, "wrong_answer")),
        (Exact(), "yes", {"text": "Yes"}, (0.0, "wrong_answer")),
        (Exact(ignore_case=True), "yes", {"text": "Yes"}, (1.0, None)),
        (Contains(), "It is BLUE and red", {"all_of": ["blue", "red"]}, (1.0, None)),
        (Contains(), "It is blue", {"all_of": ["blue", "red"]}, (0.0, "wrong_answer")),
        (Contains(), "It is blue", {"any_of": ["blue", "red"]}, (1.0, None)),
        (Contains(ignore_case=False), "BLUE", {"any_of": ["blue"]}, (0.0, "wrong_answer")),
        (Regex(), "order 1234 sent", {"pattern": r"\b\d{4}\b"}, (1.0, None)),
        (Regex(), "order 12345 sent", {"pattern": r"\b\d{4}\b"}, (0.0, "wrong_answer")),
        (Regex(ignore_case=True), "OK", {"pattern": "^ok$"}, (1.0, None)),
        (Choice(("A", "B")), "B", {"choice": "B"}, (1.0, None)),
        (Choice(("A", "B")), "(B) because A is wrong", {"choice": "B"}, (1.0, None)),
        (Choice(("A", "B")), "B: A is wrong", {"choice": "B"}, (1.0, None)),
        (Choice(("A", "B")), "The answer is B", {"choice": "B"}, (1.0, None)),
        (Choice(("A", "B")), "The answer is A", {"choice": "B"}, (0.0, "wrong_answer")),
        (Choice(("A", "B")), "Either A or B", {"choice": "B"}, (0.0, "ambiguous_answer")),
        (Choice(("A", "B")), "Both", {"choice": "B"}, (0.0, "no_answer")),
    ],
)
def test_small_scorers(
    scorer: Scorer, text: str, target: dict[str, Any], expected: tuple[float, str | None]
) -> None:
    assert value_and_failure(scorer, text, target) == expected


def test_a_score_below_1_has_a_known_failure() -> None:
    with pytest.raises(AssertionError):
        Score(0.5, "", "no kind given", None)
    with pytest.raises(AssertionError):
        Score(0.5, "", "unknown kind", "bad_luck")
