"""Calls of what the API does not have are named, with the nearest right name; others pass."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.data.messages import normal_messages
from mlx_ft.data.rows import Row, read_rows
from mlx_ft.data.tool_api import read_api
from mlx_ft.data.tool_calls import check_rows, python_code
from tests.support.paths import QUICKSTART

API = """
- name: validate_component
  arguments: {name: string, strict: optional boolean, depth: optional integer}
  returns: [valid, errors]
- name: list_components
  arguments: {}
  returns: [items]
- name: move
  arguments: {x: number, to: array}
- type: function
  function:
    name: send
    parameters:
      type: object
      properties: {text: {type: string}, times: {type: integer}, note: {}}
      required: [text]
"""


@pytest.fixture
def api(tmp_path: Path) -> Any:
    (tmp_path / "api.yaml").write_text(API)
    return read_api(tmp_path / "api.yaml")


def said(answer: str, api: Any, **message: Any) -> list[tuple[str, str]]:
    messages = normal_messages([{"role": "assistant", "content": answer, **message}])
    faults = check_rows([Row(7, "messages", messages, None, None, None)], api)
    assert all(fault.line == 7 for fault in faults)
    return [(fault.found, fault.fix) for fault in faults]


GOOD = [
    'validate_component("button")',
    'result = validate_component(name="button", strict=True)\nprint(result.valid, len("a"))',
    "for item in list_components().items:\n    validate_component(item.name)",
    "move(1, to=[2, 3])",
    "move(1.5, [2])",
    'send("a", note={"free": 1})',
    "arguments = {}\nsend(**arguments)",
    'execute_code("""send(text="hi", times=2)""")',
    "Here it is:\n```python\nsend(text='hi')\n```\nDone.",
    "def helper(a):\n    return a\nsend(helper('a'))",
    "import os\nos.remove('a')\nsend(text='gone')",
    "Call it (with care) when you like.",
    "print('hi')",
    "send('a\\d')",
    "",
    # Blocks of other languages, and what the next block then is.
    '```json\n{"text": "f()"}\n```\nso\n```python\nsend(text="hi")\n```',
    "```bash\nsend(txt)\n```",
    # What one block defines, the next may call.
    "```python\nimport os\ndef helper(a):\n    return a\n```\nand then\n"
    "```python\nsend(helper(os.getcwd()))\nhelper('a')\n```",
    'validate_component("a", strict=None, depth=None)',
    # A name that is something else as well is not judged.
    "r = list_components()\nfor r in r.items:\n    print(r.name)",
    "r = list_components()\nwith open('a') as r:\n    r.read()",
    "r = list_components()\nr, other = r.items, 1\nr.name",
    "r = list_components()\nprint([r.name for r in r.items])",
    "r = list_components()\ntry:\n    send('a')\nexcept OSError as r:\n    print(r.errno)",
    "r = list_components()\ndef f(r):\n    return r.name",
]


@pytest.mark.parametrize("answer", GOOD)
def test_what_the_api_has_passes(answer: str, api: Any) -> None:
    assert said(answer, api) == []


@pytest.mark.parametrize(
    ("answer", "found", "fix"),
    [
        (
            'result = validate_component("a")\nif result.valid_component:\n    send(text="ok")',
            "attribute result.valid_component is not in the API",
            "did you mean result.valid?",
        ),
        (
            "list_components().body",
            "attribute list_components().body is not in the API",
            "list_components gives items",
        ),
        (
            'validate_component_direct("a")',
            "function validate_component_direct is not in the API",
            "did you mean validate_component?",
        ),
        (
            'send(text="a")\nnotify_all()',
            "function notify_all is not in the API",
            "",
        ),
        ("validate_component()", "validate_component is called without name", "give it"),
        (
            'validate_component("a", strikt=True)',
            "validate_component has no argument strikt",
            "did you mean strict?",
        ),
        (
            'validate_component("a", strict="yes")',
            "argument strict of validate_component is a string",
            "it takes a boolean",
        ),
        (
            'validate_component("a", depth=True)',
            "argument depth of validate_component is a boolean",
            "it takes an integer",
        ),
        ('send("a", 2, "n", 4)', "send has no argument number 4", ""),
        (
            'execute_code("""send(txt="hi")""")',
            "send has no argument txt",
            "did you mean text?",
        ),
        (
            '```json\n{"a": 1}\n```\nso\n```python\nsend(txt="hi")\n```',
            "send has no argument txt",
            "did you mean text?",
        ),
        ("```Python title=x\nsend(text=3)\n```", "argument text of send is an integer", "string"),
        (
            "    send(\n        text=3)\n    print()",
            "argument text of send is an integer",
            "string",
        ),
        ("send(text=None)", "argument text of send is a null", "it takes a string"),
        (
            "r = list_components()\nr = list_components()\nr.name",
            "attribute r.name is not in the API",
            "",
        ),
        ("```py\nsend(text=3)\n```", "argument text of send is an integer", "it takes a string"),
    ],
)
def test_what_it_has_not_is_named(answer: str, found: str, fix: str, api: Any) -> None:
    faults = said(answer, api)
    assert any(found == one and fix in other for one, other in faults), faults


def test_json_tool_calls_are_checked(api: Any) -> None:
    def call(name: str, arguments: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    assert said("", api, tool_calls=[call("send", {"text": "a", "note": None})]) == []
    assert said("", api, tool_calls=[call("send", {"text": "a", "times": None})]) == []
    assert said("", api, tool_calls=[call("send", json.dumps({"text": "a"}))]) == []
    bare = {"name": "send", "arguments": {"text": "a"}}
    assert said("", api, tool_calls=[bare]) == []
    wrong = [call("send", {"text": 1}), call("sent", {"text": "a"}), call("send", {})]
    assert [found for found, _ in said("", api, tool_calls=wrong)] == [
        "argument text of send is an integer",
        "function sent is not in the API",
        "send is called without text",
    ]


def test_what_the_user_says_is_nobodys_call(api: Any) -> None:
    messages = ({"role": "user", "content": "validate_component_direct('a')"},)
    assert check_rows([Row(1, "messages", messages, None, None, None)], api) == []


def test_a_name_that_may_be_of_two_functions_is_not_judged(api: Any) -> None:
    code = 'r = validate_component("a")\nr = list_components()\nr.valid'
    assert said(code, api) == []


def test_the_quickstarts_rows_call_what_its_suite_knows(tmp_path: Path) -> None:
    suite = yaml.safe_load((QUICKSTART.parents[2] / "evals" / "code_mode.yaml").read_text())
    functions = [
        {"name": name, "arguments": dict.fromkeys(arguments, "string")}
        for name, arguments in suite["scorer"]["tools"].items()
    ]
    wrapper = {"name": suite["scorer"]["wrapper"], "arguments": {"code": "string"}}
    (tmp_path / "api.json").write_text(json.dumps([*functions, wrapper]))
    rows = read_rows(QUICKSTART / "train.jsonl").rows
    known = dict(read_api(tmp_path / "api.json"))
    assert check_rows(rows, known) == []
    calls = sum(bool(python_code(str(row.messages[-1]["content"]))) for row in rows if row.messages)
    assert calls > 300, "the check saw them"
    del known["git_diff"]
    assert {"git_diff" in fault.found for fault in check_rows(rows, known)} == {True}


@given(st.text(max_size=200))
def test_any_answer_is_judged_without_an_error(text: str) -> None:
    for answer in (text, f"```python\n{text}\n```", f"f({text!r})"):
        python_code(answer)


@pytest.mark.parametrize(
    "code",
    [
        "a." * 1500 + "b()",
        "a." * 40_000 + "b()",
        "(" * 150 + "f()" + ")" * 150,
        "f()" + "()" * 3000,
        "-" * 5000 + "f()",
        "f(" + "[{" * 90,
        "f(1" + "+1" * 20_000 + ")",
    ],
    ids=lambda code: code[:12],
)
def test_code_of_any_depth_is_judged_without_an_error(code: str, api: Any) -> None:
    said(code, api)
