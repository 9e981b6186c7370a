"""Each scorer keeps its rule; a shipped suite can be passed, and only by its own answers."""

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.evaluate.scorers.combined import AllOf, AnyOf
from mlx_ft.evaluate.scorers.instructions import RULES, Instructions, Rules, sentences_in
from mlx_ft.evaluate.scorers.json_schema import schema_faults, violations
from mlx_ft.evaluate.scorers.protocol import Given, Scorer
from mlx_ft.evaluate.scorers.registry import SCORERS
from mlx_ft.evaluate.scorers.score import ideal_answer, reference_of, score
from mlx_ft.evaluate.scorers.structured import Json
from mlx_ft.evaluate.scorers.text import (
    Exact,
    Numeric,
    Perplexity,
    Regex,
    Similarity,
    Talk,
    chrf,
    numbers_in,
)
from mlx_ft.evaluate.scorers.tool_calls import ToolCall
from mlx_ft.evaluate.scorers.tool_formats import tool_formats
from mlx_ft.evaluate.signs import signs_of
from mlx_ft.evaluate.suites import Suite, load_suites
from mlx_ft.recipe.fields import Section
from mlx_ft.text.language import language_of
from mlx_ft.text.timed_regex import TooSlow, search
from tests.support.paths import EVALS

SUITES = load_suites(sorted(EVALS.rglob("*.yaml")))
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]
WEATHER = {"calls": [{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}]}


def got(scorer: Scorer, text: str, target: dict[str, Any], **given: Any) -> tuple[float, Any]:
    judged = score(scorer, text, target, None, Given(**given))
    return judged.value, judged.failure


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_every_sample_of_every_suite_can_be_passed_and_not_by_the_answers_of_others(
    suite: Suite,
) -> None:
    answers = {s.id: s.example or ideal_answer(suite.scorer, s.target) for s in suite.samples}
    assert all(answers.values()), "a sample without a right answer needs an example"
    others_below = 0
    names = [sample.id for sample in suite.samples]
    for number, sample in enumerate(suite.samples):
        near = {(names * 2)[number + step] for step in range(1, 9)}
        given = Given(tools=sample.tools or ())
        own = answers[sample.id] or ""
        assert score(suite.scorer, own, sample.target, None, given).value == 1.0, sample.id
        values = {
            other: score(suite.scorer, answer or "", sample.target, None, given).value
            for other, answer in answers.items()
            if other in near and answer != own
        }
        if isinstance(suite.scorer, Talk):  # several prompts may accept the same word
            others_below += min(values.values()) < 1.0 or not sample.target.get("any_of")
        else:
            others_below += max(values.values()) < 1.0
    assert others_below == len(suite.samples)


def test_the_list_of_scorers_is_closed_and_each_has_its_rule_in_words() -> None:
    assert len(SCORERS) == 14
    for name, entry in SCORERS.items():
        keys, rule = entry
        assert get_args(keys.model_fields["name"].annotation) == (name,)
        assert issubclass(entry.target, Section)
        assert len((rule.__doc__ or "").split()) > 5


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1,234.5 and -3", [1234.5, -3]),
        ("5-3=2", [5, 3, 2]),
        ("$0.50, 20 %, .5", [0.5, 20, 0.5]),
        ("2e-4 x86 v1.2", [2e-4]),
        ("1,2,3", [1, 2, 3]),
        ("\u22127", [-7]),
        ("1e999 none", []),
        ("", []),
    ],
)
def test_numbers_are_found_as_people_write_them(text: str, numbers: list[float]) -> None:
    assert numbers_in(text) == numbers


@given(st.integers(-(10**12), 10**12) | st.floats(-1e9, 1e9))
def test_a_number_is_found_again(number: float) -> None:
    assert got(Numeric(), f"It is {number!r}.", {"number": number})[0] == 1.0
    assert got(Numeric(), f"It is {number!r}", {"number": number + max(1, abs(number) / 9)})[0] == 0


def test_which_number_counts_and_how_far_off_it_may_be() -> None:
    text = "From 3 to 12"
    assert got(Numeric(), text, {"number": 12}) == (1.0, None)
    assert got(Numeric(take="first"), text, {"number": 3}) == (1.0, None)
    assert got(Numeric(take="only"), text, {"number": 3}) == (0.0, "ambiguous_answer")
    assert got(Numeric(tolerance=0.5), "12.4", {"number": 12})[0] == 1.0
    assert got(Numeric(relative_tolerance=0.01), "12.4", {"number": 12}) == (0.0, "wrong_answer")
    assert got(Numeric(), "twelve", {"number": 12}) == (0.0, "no_answer")


@pytest.mark.slow
def test_a_pattern_that_would_never_end_is_given_up() -> None:
    evil = r"(?:(a|aa|a{3})+)+b\1$"
    with pytest.raises(TooSlow):
        search(evil, "a" * 60 + "b!")
    assert got(Regex(), "a" * 30 + "b!", {"pattern": evil}) == (0.0, "too_slow")


SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["relevant", "score"],
    "properties": {
        "relevant": {"type": "boolean"},
        "score": {"type": "integer", "minimum": 0, "maximum": 10},
        "topics": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
    },
    "additionalProperties": False,
}
NEWS = {"value": {"relevant": True, "score": 7}}


@pytest.mark.parametrize(
    ("text", "value", "failure"),
    [
        ('{"relevant": true, "score": 7}', 1.0, None),
        ('{"score": 7.0, "relevant": true}', 1.0, None),
        ('```json\n{"relevant": true, "score": 7}\n```', 0.5, "extra_text"),
        ('Sure: {"relevant": true, "score": 7}', 0.5, "extra_text"),
        ('{"relevant": true, "score": 6}', 0.5, "wrong_field"),
        ('{"relevant": true, "score": 70}', 0.25, "schema"),
        ('{"relevant": 1, "score": 7}', 0.25, "schema"),
        ('{"relevant": true}', 0.25, "schema"),
        ('{"relevant": true, "score": 7, "why": "x"}', 1 / 3, "schema"),
        ('{"relevant": true, "score": NaN}', 0.0, "not_json"),
        ("relevant, 7", 0.0, "not_json"),
        ('"text"', 0.0, "not_json"),
    ],
)
def test_structured_answers(text: str, value: float, failure: str | None) -> None:
    judged = score(Json(SCHEMA), text, NEWS)
    assert judged.value == pytest.approx(value) and judged.failure == failure


def test_fields_that_do_not_count_and_near_values() -> None:
    target = {"value": {"a": 1.0, "why": "x", "b": {"c": "Yes"}}}
    scorer = Json(None, ("why",), 0.1, True)
    assert got(scorer, '{"a": 1.05, "b": {"c": " yes"}}', target) == (1.0, None)
    assert got(scorer, '{"a": 1.2, "b": {"c": "yes"}}', target) == (0.5, "wrong_field")
    assert got(Json(SCHEMA), '{"relevant": false, "score": 0}', {}) == (1.0, None)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(min_size=1, max_size=4), JSON_VALUES, min_size=1), JSON_VALUES)
def test_any_object_is_its_own_right_answer(value: dict[str, Any], other: Any) -> None:
    assert got(Json(), json.dumps(value), {"value": value}) == (1.0, None)
    assert got(Json(), json.dumps({**value, "another": 1}), {"value": value})[0] < 1
    assert violations(value, {"const": value}) == []
    assert isinstance(violations(other, SCHEMA), list)


def test_a_schema_that_would_not_be_kept_is_refused() -> None:
    assert list(schema_faults(SCHEMA)) == []
    wrong: list[dict[str, Any]] = [
        {"$ref": "#"},
        {"type": "text"},
        {"items": 3},
        {"pattern": "("},
        {"requierd": []},
    ]
    for bad in wrong:
        assert list(schema_faults(bad)), bad
    assert violations(["a", "b", "c"], SCHEMA["properties"]["topics"]) != []


CALL = '{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}'
TAGGED = f"<tool_call>\n{CALL}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "value", "failure"),
    [
        (TAGGED, 1.0, None),
        (f"I will look. {TAGGED}", 1.0, None),
        (
            "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n"
            "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
            1.0,
            None,
        ),
        ('[TOOL_CALLS]weather[ARGS]{"city": "Oslo", "days": 3}', 1.0, None),
        (CALL, 0.5, "wrong_wrapper"),
        (TAGGED.replace("weather", "wether"), 0.0, "wrong_tool"),
        (TAGGED.replace(', "days": 3', ""), 0.0, "missing_argument"),
        (TAGGED.replace('"days": 3', '"days": 3, "unit": "C"'), 0.0, "unexpected_argument"),
        (TAGGED.replace('"days": 3', '"days": "3"'), 0.0, "wrong_type"),
        (TAGGED.replace('"days": 3', '"days": 4'), 0.0, "wrong_argument"),
        (TAGGED + TAGGED, 0.0, "extra_call"),
        ("<tool_call>\n{\n</tool_call>", 0.0, "unparsable"),
        ("It is cold in Oslo.", 0.0, "prose"),
    ],
)
def test_tool_calls(text: str, value: float, failure: str | None) -> None:
    assert got(ToolCall(), text, WEATHER, tools=TOOLS) == (value, failure)


def test_what_a_tool_call_may_leave_out_and_say_differently() -> None:
    call = {**WEATHER["calls"][0], "accepted": {"city": ["Kristiania"]}, "optional": ["days"]}
    target = {"calls": [call]}
    other = '<tool_call>{"name": "weather", "arguments": {"city": "Kristiania"}}</tool_call>'
    assert got(ToolCall(), other, target, tools=TOOLS) == (1.0, None)
    loose = TAGGED.replace("Oslo", "OSLO.")
    assert got(ToolCall(), loose, WEATHER, tools=TOOLS)[1] == "wrong_argument"
    assert got(ToolCall(loose_strings=True), loose, WEATHER, tools=TOOLS) == (1.0, None)
    assert got(ToolCall("json"), CALL, WEATHER) == (1.0, None)
    assert got(ToolCall("json"), TAGGED, WEATHER) == (0.5, "wrong_wrapper")
    assert got(ToolCall(), "No need.", {"calls": []}) == (1.0, None)
    assert got(ToolCall(), TAGGED, {"calls": []}) == (0.0, "extra_call")


def test_calls_may_be_in_any_order_unless_one_is_given() -> None:
    one, two = WEATHER["calls"][0], {"name": "f", "arguments": {}}
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>' + TAGGED
    assert got(ToolCall(), text, {"calls": [one, two]}) == (1.0, None)
    ordered = ToolCall("auto", "given")
    assert got(ordered, text, {"calls": [one, two]}) == (0.0, "wrong_order")
    assert got(ordered, text, {"calls": [two, one]}) == (1.0, None)
    assert got(ToolCall(), TAGGED, {"calls": [one, two]}) == (0.0, "missing_call")


def test_mlx_lms_parsers_are_all_there() -> None:
    assert {"json_tools", "qwen3_coder", "mistral", "pythonic", "gemma4"} <= set(tool_formats())
    assert next(iter(tool_formats())) == "json_tools"


@pytest.mark.parametrize(
    ("rule", "value", "follows", "breaks"),
    [
        ("min_words", 2, "two words", "one"),
        ("max_words", 2, "two words", "three words here"),
        ("min_sentences", 2, "One. Two", "One."),
        ("max_sentences", 1, "One!", "One! Two?"),
        ("paragraphs", 2, "a\n\nb", "a\nb"),
        ("bullets", 2, "- a\n* b", "- a"),
        ("numbered", 2, "1. a\n2) b", "a 1. b"),
        ("includes", ["cat"], "A Cat.", "concatenate"),
        ("excludes", ["cat"], "concatenate", "A cat"),
        ("starts_with", "Dear", " Dear you", "My dear"),
        ("ends_with", "Bye", "so. Bye ", "Bye."),
        (
            "language",
            "de",
            "Das ist ein kleiner Satz und er ist gut.",
            "This is it, and it is so",
        ),
        ("case", "upper", "ALL OF IT 1", "Not"),
        ("json", True, "[1]", "[1"),
        ("no_commas", True, "a b", "a, b"),
        ("quoted", True, '"so"', "so"),
        ("title", True, "# Title\ntext", "text"),
    ],
)
def test_instructions(rule: str, value: Any, follows: str, breaks: str) -> None:
    target = {"rules": {rule: value}}
    assert got(Instructions(), follows, target) == (1.0, None)
    assert got(Instructions(), breaks, target) == (0.0, "instruction")
    both = {"rules": {rule: value, "excludes" if rule != "excludes" else "min_words": ["qqq"]}}
    if rule != "excludes":
        assert got(Instructions(), breaks, both) == (0.5, "instruction")


def test_every_rule_has_a_key() -> None:
    names = {field.alias or name for name, field in Rules.model_fields.items()}
    assert names == set(RULES)
    assert sentences_in("3.5 is e.g. a number. Yes!") == 3  # "e.g." counts, as it does in IFEval


@given(st.text(min_size=1, max_size=60), st.text(min_size=1, max_size=60))
def test_likeness_is_1_for_the_same_and_between_0_and_1(one: str, other: str) -> None:
    assert 0 <= chrf(one, other) <= 1
    if one.split():
        assert chrf(one, one) == 1.0


def test_likeness_is_chrf() -> None:
    # One run of each length: abc and abd share 2 of 3, 1 of 2 and 0 of 1 runs in both directions.
    assert chrf("abc", "abd") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert got(Similarity(0.3), "abc", {"references": ["xyz", "abd"]}) == (1.0, None)
    assert got(Similarity(), "abc", {"references": ["abd"]})[1] == "dissimilar"


def test_perplexity_is_of_the_reference_and_has_to_be_measured() -> None:
    target = {"reference": "Paris", "max_perplexity": 2.0}
    assert reference_of(Perplexity(), target) == "Paris"
    assert reference_of(AllOf((Exact(), Perplexity())), {"of": [{"text": "x"}, target]}) == "Paris"
    assert reference_of(Exact(), {"text": "x"}) is None
    assert got(Perplexity(), "", target, reference_loss=0.6) == (1.0, None)
    value, failure = got(Perplexity(), "Paris", target, reference_loss=1.3862943611)
    assert value == pytest.approx(0.5) and failure == "unlikely"
    for loss in (1e9, float("inf"), float("nan")):
        assert got(Perplexity(), "", target, reference_loss=loss)[0] < 1e-9
    with pytest.raises(AssertionError):
        score(Perplexity(), "Paris", target)


def test_any_and_all() -> None:
    target = {"of": [{"text": "four"}, {"number": 4}]}
    either, both = AnyOf((Exact(), Numeric())), AllOf((Exact(), Numeric()))
    assert got(either, "four", target)[0] == got(either, "It is 4", target)[0] == 1.0
    assert got(either, "five", target)[0] == 0.0
    assert got(both, "four", target) == (0.0, "no_answer")
    assert ideal_answer(either, target) == "four" and ideal_answer(both, target) is None


@pytest.mark.parametrize(
    ("text", "raw", "finish", "question", "signs"),
    [
        ("Paris.", "Paris.", "stop", "Where is the tower and what is it?", []),
        ("", "", "stop", "x", ["empty"]),
        ("no no no no no no no no no", "", "length", "x", ["loop", "cut"]),
        ("a", "a", "loop", "x", ["loop"]),
        ("Hi", "Hi<|im_start|>user", "stop", "x", ["leaked_token"]),
        ("Hi [INST]", "Hi [INST]", "stop", "x", ["leaked_token"]),
        ("f", "<|tool_call>f", "stop", "x", []),
        ("so", "<think>so", "length", "x", ["cut", "open_thinking"]),
        (
            "巴黎是法国的首都也是最大的城市。",
            "",
            "stop",
            "What is the name of the place that you like and why?",
            ["wrong_language"],
        ),
        ("Das ist der Turm und er ist hoch, ja.", "", "stop", "Translate this to German", []),
    ],
)
def test_signs(text: str, raw: str, finish: str, question: str, signs: list[str]) -> None:
    assert signs_of(text, raw or text, None, finish, question) == signs


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the name of the place that you like?", "en"),
        ("Ich weiß nicht, was das ist, aber es ist schön.", "de"),
        ("Je ne sais pas ce que c'est, mais il est dans la maison.", "fr"),
        ("No sé lo que es, pero está en la casa y es muy grande.", "es"),
        ("これは何ですか、教えてください", "ja"),
        ("Что это такое и где оно", "ru"),
        ("print(x)", None),
        ("Paris Berlin Oslo Madrid", None),
        ("", None),
    ],
)
def test_languages(text: str, language: str | None) -> None:
    assert language_of(text) == language
