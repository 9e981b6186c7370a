"""A list of functions is read as tools write it; what is wrong with one is a message."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_ft.data.tool_api import Argument, Function, read_api
from mlx_ft.errors import DataError

SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "times": {"type": "integer"}},
    "required": ["text"],
}
SEND = Function(
    "send", {"text": Argument(("string",), True), "times": Argument(("integer",), False)}, None
)


@pytest.mark.parametrize("key", ["parameters", "inputSchema", "input_schema"])
@pytest.mark.parametrize("ending", [".json", ".yaml"])
def test_tools_are_read_in_every_usual_spelling(tmp_path: Path, key: str, ending: str) -> None:
    tool = {"name": "send", "description": "Send it.\n\tTwice.", key: SCHEMA}
    path = tmp_path / f"api{ending}"
    for written in ([tool], {"tools": [tool]}, [{"type": "function", "function": tool}]):
        path.write_text(json.dumps(written))
        assert read_api(path) == {"send": SEND}


def test_json_is_read_as_json(tmp_path: Path) -> None:
    """Tabs, escaped emoji and more values than a recipe may have."""
    tools: list[dict[str, Any]] = [
        {"name": f"f{n}", "description": "\U0001f600", "parameters": SCHEMA} for n in range(1500)
    ]
    path = tmp_path / "api.json"
    path.write_text(json.dumps(tools, indent="\t"))
    assert "\\ud83d" in path.read_text()
    assert len(read_api(path)) == 1500


@pytest.mark.parametrize(
    ("ending", "text", "found"),
    [
        (".json", '[\n{"name": "a",\n}]', r"api\.json:3: not valid JSON"),
        (".json", '[{"name": "a", "x": NaN}]', "NaN is not JSON"),
        (".json", "[" * 5000, "not valid JSON"),
        (".json", "[" * 50 + "]" * 50, "nested deeper than 32 levels"),
        (".json", '[{"name": "\\ud800"}]', "half of a surrogate pair"),
        (".yaml", "", "not a list of functions"),
        (".yaml", "a: [", "is not YAML"),
        (".yaml", "- arguments: {}", "without a name"),
        (".yaml", "- {name: a, arguments: {x: text}}", "is of type 'text'"),
        (".yaml", "- {name: a, arguments: 3}", "neither a mapping nor a list"),
        (".yaml", "- {name: a, returns: 3}", "not a list of attribute names"),
        (".yaml", "- {name: a, parameters: 3}", "not a JSON schema"),
        (".yaml", "- name: a\n- name: a", "is there twice"),
        (
            ".yaml",
            "- {name: a, argument: {x: string}}",
            "unknown key 'argument'; did you mean arguments",
        ),
        (".yaml", "- {name: a, body: {x: string}}", "unknown key 'body'; it has arguments"),
        (
            ".yaml",
            "- {name: a, arguments: {}, inputSchema: {}}",
            "has both arguments and inputSchema",
        ),
        (".yaml", '- {name: "a\\nb"}', "cannot be a name"),
        (".yaml", '- {name: a, description: "\\x1b[31m"}', "control character"),
    ],
)
def test_a_broken_list_is_a_message(tmp_path: Path, ending: str, text: str, found: str) -> None:
    path = tmp_path / f"api{ending}"
    path.write_text(text)
    with pytest.raises(DataError, match=found):
        read_api(path)
    with pytest.raises(DataError, match="does not exist"):
        read_api(tmp_path / "nowhere.yaml")
