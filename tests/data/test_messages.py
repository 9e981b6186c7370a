"""What is certainly wrong with a conversation is said; what a template may take is let through."""

from typing import Any

import pytest

from mlx_ft.data.messages import message_complaints, normal_messages, tools_complaints

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "hi"}
SYSTEM = {"role": "system", "content": "be brief"}
RESULT = {"role": "tool", "content": "ok"}


def assistant(**extra: Any) -> dict[str, Any]:
    return {"role": "assistant", **extra}


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ANSWER],
        [SYSTEM, USER, ANSWER, USER, ANSWER],
        [USER, USER, ANSWER],
        [ANSWER],
        [USER, ANSWER, RESULT, RESULT, ANSWER],
        [USER, {**ANSWER, "name": "a", "reasoning_content": "b", "weight": 1}],
        [USER, assistant(content="", tool_calls=[{"name": "f"}])],
        [USER, assistant(tool_calls=[{"function": {"name": "f", "arguments": '{"a": 1}'}}])],
    ],
)
def test_unusual_but_possible_conversations_pass(messages: list[Any]) -> None:
    assert message_complaints(messages) == []
    assert normal_messages(messages)[-1]["role"] == "assistant"


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        (None, "messages not a list of turns"),
        ([], "messages not a list of turns"),
        ("hello", "messages not a list of turns"),
        ([USER, "hi"], "message not an object"),
        ([USER, {"content": "hi"}], "unknown role"),
        ([{"role": "human", "content": "x"}, ANSWER], "unknown role"),
        ([{"role": ["user"], "content": "x"}, ANSWER], "unknown role"),
        ([{"role": "user"}, ANSWER], "no content"),
        ([{"role": "user", "content": [{"type": "text"}]}, ANSWER], "content not text"),
        ([USER, assistant(content=" \n")], "empty answer"),
        ([USER, assistant(content=None)], "no content"),
        ([USER, assistant(tool_calls=[])], "no content"),
        ([USER], "no answer at the end"),
        ([USER, ANSWER, USER], "no answer at the end"),
        ([SYSTEM], "no answer at the end"),
        ([RESULT, ANSWER], "tool result out of place"),
        ([USER, RESULT, ANSWER], "tool result out of place"),
        ([{**USER, "tool_calls": [{"name": "f"}]}, ANSWER], "tool calls of another role"),
        ([USER, assistant(tool_calls="f()")], "broken tool call"),
        ([USER, assistant(tool_calls=[{}])], "broken tool call"),
        ([USER, assistant(tool_calls=[{"function": None}])], "broken tool call"),
        ([USER, assistant(tool_calls=[{"name": "f", "arguments": "a=1"}])], "broken tool call"),
        ([USER, assistant(tool_calls=[{"name": "f", "arguments": [1]}])], "broken tool call"),
        (
            [USER, assistant(tool_calls=[{"name": "f", "arguments": '{"a":NaN}'}])],
            "broken tool call",
        ),
        ([USER, {**ANSWER, "weight": 0}], "weighted turn"),
        ([USER, {**ANSWER, "name": 3}], "name not text"),
        ([USER, {**ANSWER, "content": "a\x00"}], "broken text"),
        ([USER, {**ANSWER, "\udc80": "a"}], "broken text"),
        ([USER, {**ANSWER, "score": float("inf")}], "broken number"),
    ],
)
def test_a_wrong_conversation_is_refused(messages: Any, kind: str) -> None:
    assert kind in [complaint.kind for complaint in message_complaints(messages)]


def test_all_that_is_wrong_with_a_row_is_said_at_once() -> None:
    messages = [{"role": "human", "content": "x"}, {"role": "user", "content": 3}, "x"]
    kinds = [complaint.kind for complaint in message_complaints(messages)]
    assert kinds == ["unknown role", "content not text", "message not an object"]


@pytest.mark.parametrize(("given", "meant"), [("human", "user"), ("GPT", "assistant")])
def test_a_role_of_another_convention_gets_its_name(given: str, meant: str) -> None:
    (complaint,) = message_complaints([{"role": given, "content": "x"}, ANSWER])
    assert complaint.fix == f'write "{meant}"'


def test_depth_is_limited_before_anything_recursive_sees_it() -> None:
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    complaints = message_complaints([{**USER, "extra": deep}, ANSWER])
    assert [complaint.kind for complaint in complaints] == ["nested too deeply"]


@pytest.mark.parametrize("tools", [None, [], [{"type": "function"}]])
def test_good_tools_pass(tools: Any) -> None:
    assert tools_complaints(tools) == []


@pytest.mark.parametrize("tools", ["[]", {"name": "f"}, [1], [{"a": "\ud800"}]])
def test_bad_tools_are_refused(tools: Any) -> None:
    assert tools_complaints(tools)
