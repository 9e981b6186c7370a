"""A JSON schema is kept in full or refused; no answer makes its check crash, hang or fetch."""

import json
import socket
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from mlx_ft.errors import DataError
from mlx_ft.evaluate.scorers.json_schema import (
    MAX_DEPTH_OF_VALUE,
    MAX_VIOLATIONS,
    schema_faults,
    violations,
)
from mlx_ft.evaluate.scorers.protocol import Given
from mlx_ft.evaluate.scorers.structured import Json, JsonKeys
from mlx_ft.evaluate.suites import load_suite
from tests.support.slow import fast_rows_first


class Address(BaseModel):
    street: str
    zip_code: Annotated[str, Field(pattern=r"^\d{5}$")]


class Card(BaseModel):
    kind: Literal["card"]
    number: str = Field(min_length=4)


class Cash(BaseModel):
    kind: Literal["cash"]
    amount: float = Field(gt=0)


class Order(BaseModel, extra="forbid"):
    status: Literal["new", "paid"]
    address: Address
    billing: Address | None = None
    items: list[str] = Field(min_length=1)
    pair: tuple[int, str] = (1, "")
    payment: Annotated[Card | Cash, Field(discriminator="kind")]
    prices: dict[str, int] = {}


ORDER = Order.model_json_schema()
HOME = {"street": "Elm", "zip_code": "12345"}
PAID = {"status": "paid", "address": HOME, "items": ["x"], "payment": {"kind": "cash", "amount": 2}}


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, []),
        ({"billing": None}, []),
        ({"billing": HOME, "pair": [3, "y"], "prices": {"x": 3.0}}, []),
        ({"payment": {"kind": "card", "number": "1234"}}, []),
        ({"status": "lost"}, ["the answer.status is none of the 2 values allowed"]),
        ({"items": []}, ["the answer.items has 0 items"]),
        ({"items": ["x", 3]}, ["the answer.items[1] is no string"]),
        ({"items": ["x", True]}, ["the answer.items[1] is no string"]),
        ({"address": {"street": "Elm"}}, ["the answer.address has no zip_code"]),
        (
            {"address": {**HOME, "zip_code": "1"}},
            ["the answer.address.zip_code does not match its pattern"],
        ),
        ({"billing": {}}, ["the answer.billing is none of the 2 forms allowed"]),
        ({"pair": [1]}, ["the answer.pair has 1 items"]),
        ({"pair": [1, "x", 2]}, ["the answer.pair has 3 items"]),
        ({"pair": ["x", "x"]}, ["the answer.pair[0] is no integer"]),
        ({"prices": {"x": 1.5}}, ["the answer.prices.x is no integer"]),
        (
            {"payment": {"kind": "card", "amount": 2}},
            ["the answer.payment is none of the 2 forms allowed"],
        ),
        ({"note": "hi"}, ["the answer.note should not be there"]),
    ],
)
def test_a_schema_of_pydantic_is_kept(changes: dict[str, Any], broken: list[str]) -> None:
    assert {"$defs", "additionalProperties"} <= ORDER.keys() and "$ref" in str(ORDER)
    assert "oneOf" in str(ORDER) and "anyOf" in str(ORDER) and "prefixItems" in str(ORDER)
    assert not list(schema_faults(ORDER))
    answer = {**PAID, **changes}
    found = violations(answer, ORDER)
    # A tuple of the wrong length may break two keywords at once.
    assert list(dict.fromkeys(found)) == broken
    try:
        Order.model_validate_json(json.dumps(answer))
        assert not found
    except ValidationError:
        assert found


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"oneOf": [{"type": "integer"}, {"minimum": 5}]}, [3, "x", 5.5], [7, 2.5]),
        ({"not": {"type": "string"}}, [3, None], ["x"]),
        ({"const": 1}, [1, 1.0], [True, "1", 2]),
        ({"const": {"a": [1, None]}}, [{"a": [1.0, None]}], [{"a": [True, None]}, {"a": [1]}]),
        ({"enum": [0, "x", None]}, [0, "x", None, 0.0], [False, 1, ""]),
        ({"type": "integer"}, [3, 3.0, -1], [True, 3.5, "3", None, 1e400, 10**300]),
        ({"type": "number"}, [3, 3.5], [True, "3", 1e400]),
        ({"type": ["boolean", "null"]}, [True, None], [0, 1, ""]),
        ({"uniqueItems": True}, [[1, True, "1", None, [1], [True]]], [[1, 1.0], [{"a": 1}] * 2]),
        ({"uniqueItems": False}, [[1, 1]], []),
        ({"multipleOf": 0.1}, [0.3, 1, -0.7], [0.35, 0.01]),
        ({"multipleOf": 1e-200}, [1e300, 0], []),
        ({"minItems": 1, "maxItems": 2}, [[1], [1, 2], "x"], [[], [1, 2, 3]]),
        ({"prefixItems": [{"type": "string"}], "items": False}, [[], ["x"]], [[1], ["x", 1]]),
        ({"contains": {"const": 1}, "maxContains": 2}, [[1], [1, 2, 1]], [[], [2], [1, 1, 1]]),
        ({"contains": {"const": 1}, "minContains": 2}, [[1, 1]], [[1], []]),
        ({"minProperties": 1, "maxProperties": 1}, [{"a": 1}], [{}, {"a": 1, "b": 2}]),
        ({"propertyNames": {"pattern": "^[a-z]+$"}}, [{"a": 1}, {}], [{"A": 1}]),
        ({"patternProperties": {"^n_": {"type": "integer"}}}, [{"n_a": 1, "b": ""}], [{"n_a": ""}]),
        (
            {
                "patternProperties": {"^n_": True},
                "properties": {"b": True},
                "additionalProperties": False,
            },
            [{"n_a": 1, "b": 2}],
            [{"c": 1}],
        ),
        ({"properties": {"a": False}}, [{"b": 1}], [{"a": 1}]),
        ({"dependentRequired": {"a": ["b"]}}, [{"b": 1}, {"a": 1, "b": 1}], [{"a": 1}]),
        ({"dependentSchemas": {"a": {"required": ["b"]}}}, [{}, {"a": 1, "b": 1}], [{"a": 1}]),
        (
            {"if": {"type": "string"}, "then": {"minLength": 2}, "else": {"type": "null"}},
            ["xx", None],
            ["x", 3],
        ),
        (
            {"$defs": {"a/b~c d": {"type": "null"}}, "items": {"$ref": "#/$defs/a~1b~0c%20d"}},
            [[], [None]],
            [[1]],
        ),
        ({"definitions": {"a": {"type": "null"}}, "$ref": "#/definitions/a"}, [None], [1]),
        ({"prefixItems": [{"const": 1}], "items": {"$ref": "#/prefixItems/0"}}, [[1, 1]], [[1, 2]]),
        (
            {"$schema": "http://json-schema.org/draft-04/schema#", "$id": "x:y", "const": 1},
            [1],
            [2],
        ),
        (
            {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "$id": "https://example.org/list",
                "$ref": "#/$defs/list",
                "$defs": {"list": {"items": {"$ref": "#"}, "multipleOf": 0.1}},
            },
            [0.3, [0.3, [[]]]],
            [0.35, [[0.35]]],
        ),
    ],
)
def test_keywords(schema: dict[str, Any], right: list[Any], wrong: list[Any]) -> None:
    assert not list(schema_faults(schema))
    for value in right:
        assert violations(value, schema) == [], value
    for value in wrong:
        found = violations(value, schema)
        assert found and all(each.startswith("the answer") for each in found), value


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({"$ref": "https://example.org/a.json"}, "schema.$ref is 'https://example.org/a.json', "),
        ({"items": {"$ref": "other.json#/a"}}, "schema.items.$ref is 'other.json#/a', "),
        ({"$ref": "file:///etc/passwd"}, "schema.$ref is 'file:///etc/passwd', "),
        ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, "schema.$ref is 'https://"),
        ({"$ref": "#/$defs/none"}, "schema.$ref is '#/$defs/none', where there is no schema"),
        ({"$ref": "#/type", "type": "object"}, "schema.$ref is '#/type', where there is no schema"),
        ({"$ref": "#anchor"}, "schema.$ref is '#anchor', which is not in this schema"),
        ({"$ref": "#"}, "schema refers to itself without going into the value"),
        (
            {
                "$ref": "#/$defs/a",
                "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}},
            },
            "refers to itself without going into the value",
        ),
        ({"$ref": 5}, "schema.$ref is 5"),
        ({"$dynamicRef": "#a"}, "schema.$dynamicRef is not a keyword known here"),
        ({"format": "hostname"}, "schema.format is none of date, time, date-time"),
        ({"properties": {"a": {"requierd": []}}}, "schema.properties.a.requierd is not a keyword"),
        ({"properties": {"a": {"$id": "b"}}}, "schema.properties.a.$id is known only at the top"),
        ({"items": {"$schema": "b"}}, "schema.items.$schema is known only at the top"),
        ({"type": "text"}, "schema.type is 'text'"),
        ({"type": []}, "schema.type is []"),
        ({"items": 3}, "schema.items is no schema"),
        ({"items": [{}]}, "schema.items is no schema"),
        ({"items": "nested too deeply"}, "schema.items is no schema"),
        ({"anyOf": []}, "schema.anyOf is []"),
        ({"enum": []}, "schema.enum is []"),
        ({"properties": []}, "schema.properties is []"),
        ({"required": "a"}, "schema.required is 'a'"),
        ({"minLength": -1}, "schema.minLength is -1"),
        ({"minimum": float("inf")}, "schema.minimum is inf"),
        ({"multipleOf": 0}, "schema.multipleOf is 0"),
        ({"maximum": True}, "schema.maximum is True"),
        ({"pattern": "("}, "schema.pattern is no regular expression"),
        ({"patternProperties": {"(": {}}}, "schema.patternProperties.( is no regular expression"),
        ([], "schema is no schema"),
    ],
)
def test_an_invalid_schema_and_one_that_would_not_be_kept_are_refused(
    schema: Any, fault: str
) -> None:
    faults = list(schema_faults(schema))
    assert any(fault in each for each in faults), faults
    assert len(faults) == 1
    if isinstance(schema, dict):
        with pytest.raises(ValidationError):
            JsonKeys.model_validate({"name": "json", "schema": schema})


def test_all_faults_come_at_once() -> None:
    schema = {"type": "text", "properties": {"a": {"pattern": "("}, "b": {"colour": 1}}}
    assert len(list(schema_faults(schema))) == 3


def test_a_suite_with_a_remote_reference_is_refused_and_nothing_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    question = {"id": "a", "messages": [{"role": "user", "content": "x"}], "target": {}}
    (tmp_path / "s.jsonl").write_text(json.dumps(question))
    suite = "name: s\nsamples: s.jsonl\nmax_tokens: 4\nscorer:\n  name: json\n  schema:\n"
    path = tmp_path / "s.yaml"
    path.write_text(suite + "    $ref: https://example.org/schema.json\n")
    with pytest.raises(DataError, match=r"s\.yaml:4: .*schema\.\$ref is 'https://example\.org/"):
        load_suite(path)
    path.write_text(suite + "    $ref: '#/$defs/a'\n    $defs: {a: {type: object}}\n")
    scorer = load_suite(path).scorer
    assert isinstance(scorer, Json) and scorer.schema == {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"type": "object"}},
    }
    # Even a schema that was never checked has nothing loaded for it.
    with pytest.raises(Exception, match="Unresolvable"):
        violations({}, {"$ref": "https://example.org/schema.json"})


class Leaf(BaseModel):
    children: list["Tree"] = []
    kind: Literal["leaf"]


class Branch(BaseModel):
    children: list["Tree"] = []
    kind: Literal["branch"]


Tree = Annotated[Leaf | Branch, Field(discriminator="kind")]
Leaf.model_rebuild()
Branch.model_rebuild()


def nested(levels: int, innermost: Any) -> Any:
    """A tree with a node a level, two levels of JSON each."""
    value = innermost
    for number in range(levels):
        value = {"children": [value], "kind": "leaf" if (levels - number) % 2 == 0 else "branch"}
    return value


def test_a_recursive_schema_follows_a_value_as_deep_as_it_goes() -> None:
    schema = Branch.model_json_schema()
    assert not list(schema_faults(schema))
    levels = MAX_DEPTH_OF_VALUE // 2
    started = time.process_time()
    # Tried as a leaf and as a branch at each of 32 levels, it would take four billion steps.
    assert violations(nested(levels, "x"), schema) != []
    assert violations(nested(levels - 1, {"kind": "leaf"}), schema) == []
    assert violations(nested(levels - 1, {"kind": "lea"}), schema) != []
    assert time.process_time() - started < 5


def test_a_value_that_is_too_deep_is_a_violation() -> None:
    schema = {"items": {"$ref": "#"}}
    lists: list[Any] = []
    for _ in range(MAX_DEPTH_OF_VALUE - 1):
        lists = [lists]
    assert violations(lists, schema) == []
    assert violations([lists], schema) == ["the answer is nested too deeply"]
    for _ in range(100_000):
        lists = [lists]
    assert violations(lists, schema) == ["the answer is nested too deeply"]
    while lists:  # else Python would take it apart recursively
        lists = lists.pop()


def test_long_chains_of_references_on_a_deep_value_are_a_violation_and_no_crash() -> None:
    links = {f"n{number}": {"$ref": f"#/$defs/n{number + 1}"} for number in range(40)}
    schema = {"$ref": "#/$defs/n0", "$defs": {**links, "n40": {"items": {"$ref": "#/$defs/n0"}}}}
    assert not list(schema_faults(schema))
    assert violations([[[]]], schema) == []
    deep: list[Any] = []
    for _ in range(MAX_DEPTH_OF_VALUE - 1):
        deep = [deep]
    assert violations(deep, schema) == ["the answer is nested too deeply"]


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(20):
        schema = {"properties": {"a": schema}}
    assert not list(schema_faults(schema))
    for _ in range(5_000):
        schema = {"items": schema}
    (fault,) = schema_faults(schema)
    assert fault.endswith("is nested too deeply")


def test_references_that_double_at_every_step_are_followed_once() -> None:
    twice = {
        f"n{number}": {"allOf": [{"$ref": f"#/$defs/n{number + 1}"}] * 2} for number in range(30)
    }
    schema = {"$ref": "#/$defs/n0", "$defs": {**twice, "n30": {"type": "integer"}}}
    assert not list(schema_faults(schema))
    assert violations(3, schema) == []
    assert violations("x", schema) == ["the answer is no integer"] * MAX_VIOLATIONS


@pytest.mark.slow
def test_a_check_that_takes_too_long_is_given_up() -> None:
    options = [{"$ref": f"#/$defs/n{number}"} for number in range(60)]
    forms = {f"n{number}": {"const": number} for number in range(60)}
    schema = {"items": {"anyOf": options}, "$defs": forms}
    assert violations([59, 3], schema) == []
    many = [[number] for number in range(1_000)]
    assert violations(many, schema)[-1] != "the answer takes too long to check"
    lenient = {"items": {"not": {"anyOf": options}}, "$defs": forms}
    assert violations(many, lenient) == ["the answer takes too long to check"]


EVIL = r"(?:(a|aa|a{3})+)+b\1$"
VICTIM = "a" * 30 + "b!"


@pytest.mark.parametrize(
    ("schema", "value"),
    fast_rows_first(
        [
            ({"pattern": EVIL}, VICTIM),
            ({"patternProperties": {EVIL: {}}}, {VICTIM: 1}),
            ({"propertyNames": {"pattern": EVIL}}, {VICTIM: 1}),
            ({"patternProperties": {EVIL: {}}, "additionalProperties": False}, {VICTIM: 1}),
        ]
    ),
)
def test_a_catastrophic_pattern_is_a_violation(schema: dict[str, Any], value: Any) -> None:
    assert not list(schema_faults(schema))
    (found,) = violations(value, schema)
    assert "could not be matched: searching took over 1 s" in found
    judged = Json(schema).judge(json.dumps([value]), {}, Given())
    assert judged.failure is None  # the pattern is for another place
    held = Json({"items": schema}).judge(json.dumps([value]), {}, Given())
    assert (held.value, held.failure) == (0.5, "schema")


@pytest.mark.slow
def test_many_slow_searches_end_the_check() -> None:
    found = violations([VICTIM] * 100, {"items": {"pattern": EVIL}})
    assert found[-1] == "the answer takes too long to check" and len(found) == 3


def test_a_long_answer_is_checked_at_once() -> None:
    started = time.process_time()
    unique = {"uniqueItems": True, "items": {"anyOf": [{"type": "object"}, {"type": "null"}]}}
    assert violations([{"a": number} for number in range(3_000)], unique) == []
    assert len(violations([3] * 16_000, unique)) == MAX_VIOLATIONS
    assert time.process_time() - started < 5


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
SCHEMAS = st.recursive(
    st.booleans()
    | st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["string", "integer", "array", "object", ["null", "number"]]),
            "enum": st.lists(JSON_VALUES, max_size=2),
            "minimum": st.integers(-3, 3),
            "multipleOf": st.sampled_from([0, 0.1, 3]),
            "pattern": st.sampled_from(["^a", "(", "b+"]),
            "uniqueItems": st.booleans(),
            "required": st.lists(st.text(max_size=2), max_size=2),
            "$ref": st.sampled_from(["#", "#/items", "#/properties/a", "#/$defs/b"]),
        },
    ),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "items": inner,
            "not": inner,
            "properties": st.dictionaries(st.text(max_size=2), inner, max_size=2),
            "$defs": st.dictionaries(st.just("b"), inner),
            "anyOf": st.lists(inner, max_size=2),
            "oneOf": st.lists(inner, max_size=2),
            "additionalProperties": inner,
            "$ref": st.sampled_from(["#", "#/items", "#/$defs/b"]),
        },
    ),
    max_leaves=6,
)


@given(SCHEMAS, JSON_VALUES)
def test_any_schema_is_refused_or_checks_any_value(schema: Any, value: Any) -> None:
    if not list(schema_faults(schema)):
        found = violations(value, schema)
        assert len(found) <= MAX_VIOLATIONS and found == violations(value, schema)
