"""Two chat formats are the same, or the message says in which part they differ."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.errors import ModelError
from mlx_ft.evaluate.chat_fingerprint import check_fingerprint
from mlx_ft.model.chat import ChatFormat, ChatRenderer
from tests.support.tokenizers import write_tiny_tokenizer

KEYS = st.sampled_from(["a", "b", "c"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


def parts(trained: Any, current: Any) -> list[str]:
    with pytest.raises(ModelError) as caught:
        check_fingerprint(trained, current)
    return [fault.where.removeprefix("chat fingerprint, ") for fault in caught.value.faults]


@given(st.dictionaries(KEYS, JSON), st.dictionaries(KEYS, JSON))
def test_refused_exactly_when_they_differ(one: Any, other: Any) -> None:
    check_fingerprint(one, dict(one))
    if one != other:
        assert parts(one, other)
    else:
        check_fingerprint(one, other)


def test_every_part_that_changed_is_named() -> None:
    trained = {"a": 1, "b": {"c": [1, 2, 3], "d": "x"}, "renders": [[1, 2], [3, 4]], "gone": 1}
    current = {"a": 2, "b": {"c": [1, 2], "d": "x"}, "renders": [[1, 2], [3, 5]], "new": 1}
    assert parts(trained, current) == ["a", "b.c", "gone", "new", "renders[1][1]"]


def test_a_real_renderer_agrees_with_itself_and_not_with_another(tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path)

    def fingerprint(**changes: Any) -> dict[str, Any]:
        return ChatRenderer.from_folder(folder, ChatFormat(**changes)).fingerprint()

    trained = fingerprint()
    check_fingerprint(trained, fingerprint())
    assert parts(trained, fingerprint(enable_thinking=True)) == ["enable_thinking"]
    assert parts(trained, fingerprint(date="2025-01-02")) == ["date"]
    config = folder / "tokenizer_config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("assistant\\n", "assistant\\n "), encoding="utf-8")
    changed = parts(trained, fingerprint())
    assert "template_sha256" in changed
    assert any(part.startswith("canonical_prompts[0]") for part in changed)
