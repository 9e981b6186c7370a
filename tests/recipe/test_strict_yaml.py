"""YAML as it is read here: numbers are numbers, texts are texts, nothing is there twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.recipe.strict_yaml import header_of, read_mapping, read_text, read_yaml

# The characters that YAML and JSON spell differently inside quotes are left out.
PLAIN_TEXT = st.text(
    st.characters(
        exclude_categories=("Cc", "Cs"), exclude_characters="\u2028\u2029\ufeff\ufffe\uffff"
    )
)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | PLAIN_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(PLAIN_TEXT, inner, max_size=4),
    max_leaves=12,
)


def faults_of(text: str) -> list[str]:
    return [str(fault) for fault in read_mapping(text, "f.yaml").faults]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("1.5e+3", 1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_000", 1000),
        ("-3", -3),
        ("yes", True),
        ("Off", False),
        ("~", None),
        ("", None),
        ("'1e-5'", "1e-5"),
        ("2025-01-01", "2025-01-01"),
        ("12:30:45", "12:30:45"),
        ("010", "010"),
        ("0x1f", "0x1f"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("-", [None]),
        ("=", "="),
    ],
)
def test_plain_values_are_what_they_look_like(text: str, value: Any) -> None:
    reading = read_yaml(text, "f.yaml")
    assert not reading.faults
    assert (reading.value, type(reading.value)) == (value, type(value))


def test_infinity_is_read_so_that_the_schema_can_refuse_it() -> None:
    assert read_yaml("-.inf", "").value == -math.inf


@given(JSON_VALUES)
def test_json_reads_as_itself(value: Any) -> None:
    reading = read_yaml(json.dumps(value, ensure_ascii=False), "f.yaml")
    assert not reading.faults
    assert reading.value == value


@given(st.dictionaries(st.from_regex(r"k[a-z]{1,4}", fullmatch=True), st.integers(), min_size=1))
def test_every_key_has_the_line_it_stands_on(values: dict[str, int]) -> None:
    text = "".join(f"{name}:\n  inner: {value}\n" for name, value in values.items())
    sources = read_mapping(text, "f.yaml").sources
    for index, name in enumerate(values):
        assert sources[(name,)].where == f"f.yaml:{2 * index + 1}"
        assert str(sources[(name, "inner")]) == f"f.yaml:{2 * index + 2} {name}.inner"


@given(st.text() | st.binary().map(lambda data: data.decode("utf-8", "replace")))
def test_any_text_gives_a_mapping_or_faults(text: str) -> None:
    reading = read_mapping(text, "f.yaml")
    assert isinstance(reading.value, dict)
    assert reading.faults or text.strip()


def test_a_key_given_twice_is_a_fault_at_every_depth() -> None:
    assert faults_of("a: 1\nb: {x: 1, x: 2}\na: 3\n") == [
        "f.yaml:2 b.x: is given again (first in line 2) - keep one",
        "f.yaml:3 a: is given again (first in line 1) - keep one",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a:\n\tb: 1", "f.yaml:2: a tab where spaces are needed"),
        ("a: b: c", "f.yaml:1: is not YAML"),
        ("a: [1,\nb: 2", "f.yaml:2: is not YAML"),
        ("a: 'x\nb: 1\n", "begins in line 1"),
        ("a: 1\n---\nb: 2", "f.yaml:2: a second document begins"),
        ("a: \x01", "f.yaml:1: has a character that is not text"),
        ('a: "\\x00"', "f.yaml:1 a: '\\x00' has a control character"),
        ('a: "\\ud800"', "control character"),
        ("a: !!python/object:os.system x", "is not read - remove the tag"),
        ("a: !!set {x}", "is not read"),
        ("a: !!int x", "is not a number"),
        ("a: *b", "is not YAML"),
        ("<<: {a: 1}", "merge keys"),
        ("? [a]\n: 1", "cannot be a key"),
        ("1: 2", "cannot be a key"),
        ("on: 2", "cannot be a key"),
        ("a: &a [*a]", "too big or nested too deep"),
        ("[" * 1000, "nested too deep"),
        ("a: " + "9" * 5000, "is not a number"),
        ("", "f.yaml: is empty"),
        ("# only a comment\n", "f.yaml: is empty"),
        ("[1, 2]", "holds a list of 2 at the top level"),
        ("just text", "holds 'just text' at the top level"),
    ],
)
def test_what_is_wrong_is_said_in_one_fault_with_its_line(text: str, words: str) -> None:
    (fault,) = faults_of(text)
    assert words in fault
    assert "\n" not in fault


def test_aliases_that_multiply_are_stopped() -> None:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (fault,) = faults_of("\n".join(lines))
    assert "too big" in fault


def test_an_alias_that_is_used_twice_is_a_value_like_any_other() -> None:
    assert read_mapping("a: &x 1\nb: *x", "").value == {"a": 1, "b": 1}


def test_reading_leaves_pyyaml_as_it_is() -> None:
    read_yaml("1e-5", "")
    assert str(yaml.safe_load("a: 2025-01-01")["a"]) == "2025-01-01"
    assert not isinstance(yaml.safe_load("a: 2025-01-01")["a"], str)


def test_the_header_is_the_comment_at_the_very_top() -> None:
    assert header_of("# one\n#\n#   two\na: 1\n# three\n") == "one\n\n  two"
    assert header_of("a: 1\n# one\n") == ""


def test_files_that_cannot_be_read_are_one_fault_each(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: \xe9\n")
    huge = tmp_path / "huge.yaml"
    huge.write_bytes(b"#" * 1_000_001)
    expected = {
        tmp_path / "absent.yaml": "does not exist",
        tmp_path: "is a folder",
        latin: "is not UTF-8 text (byte 3)",
        huge: "has 1.00 MB",
        tmp_path / ("x" * 300): "cannot be read",
        Path("/dev/null"): "is not a regular file",
    }
    for path, words in expected.items():
        text, faults = read_text(path)
        assert text == ""
        assert [words in fault.found for fault in faults] == [True], path


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes("\ufeffa: 1\n".encode())
    assert read_mapping(read_text(path)[0], "").value == {"a": 1}
