"""Good rows, and generators of bad ones."""

import json
import random
from typing import Any

from hypothesis import strategies as st

from mlx_ft.data.rows import Row


def chat(question: str = "hello", answer: str = "I am fine", **extra: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **extra}


CALL = {"type": "function", "function": {"name": "lint", "arguments": {"path": "a.py", "n": 1}}}
TOOL_ROW: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "lint it"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "ok", "tool_call_id": "1", "name": "lint"},
        {"role": "assistant", "content": "all is well"},
    ],
    "tools": [{"type": "function", "function": {"name": "lint", "parameters": {}}}],
}
GOOD_ROWS = (
    chat(),
    TOOL_ROW,
    {"prompt": "2 + 2?", "completion": "4"},
    {"instruction": "add", "input": "2 and 2", "output": "4", "text": "rendered elsewhere"},
    {"instruction": "add 2 and 2", "output": "4"},
    {"text": "the quick brown fox"},
)

any_text = st.text(st.characters(exclude_categories=()), max_size=12)  # surrogates and NULs too
WORDS = (
    *("messages", "role", "content", "user", "assistant", "system", "tool", "tool_calls", "tools"),
    *("function", "name", "arguments", "prompt", "completion", "instruction", "input", "output"),
    *("text", "category", "weight", "<|im_end|>", "{{ x }}", "{}", "[1]"),
)
keys = st.sampled_from(WORDS) | any_text
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.sampled_from(WORDS)
    | any_text
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


def nested(depth: int, kind: str) -> bytes:
    opening, closing = {"list": (b"[", b"]"), "object": (b'{"a":', b"}")}[kind]
    return opening * depth + b"1" + closing * depth


@st.composite
def damaged_rows(draw: st.DrawFn) -> Any:
    """A good row with one value anywhere in it replaced by any JSON value, or removed."""
    row = json.loads(json.dumps(draw(st.sampled_from(GOOD_ROWS))))
    places: list[tuple[Any, Any]] = []
    pending = [row]
    while pending:
        item = pending.pop()
        children = item.items() if isinstance(item, dict) else enumerate(item)
        for key, child in children:
            places.append((item, key))
            if isinstance(child, dict | list):
                pending.append(child)
    parent, key = draw(st.sampled_from(places))
    if draw(st.booleans()):
        parent[key] = draw(json_values)
    else:
        del parent[key]
    return row


@st.composite
def damaged_lines(draw: st.DrawFn) -> bytes:
    """The bytes of a good row, cut, or with a few bytes put in the place of others."""
    raw = json.dumps(draw(st.sampled_from(GOOD_ROWS)), ensure_ascii=draw(st.booleans())).encode()
    start = draw(st.integers(0, len(raw)))
    if draw(st.booleans()):
        return raw[:start]
    return raw[:start] + draw(st.binary(max_size=6)) + raw[start + draw(st.integers(0, 4)) :]


hostile_lines = (
    st.binary(max_size=40)
    | damaged_lines()
    | (json_values | damaged_rows()).map(lambda value: json.dumps(value).encode())
    | st.builds(nested, st.sampled_from([40, 900, 5_000, 100_000]), st.sampled_from(["list"]))
    | st.builds(nested, st.sampled_from([40, 900, 5_000]), st.sampled_from(["object"]))
    | st.sampled_from(
        [
            b"\x00" * 8,
            b"\xff\xfe{\x00",
            b"\xef\xbb\xbf{}",
            b'{"text": ' + b"9" * 5_000 + b"}",
            b'{"text": NaN}',
            b'{"messages": ' + nested(400, "list") + b"}",
            b'{"prompt": "a", "completion": "\\ud800"}',
            b'{"text": "a\\u0000b"}',
            b'{"text": "x", "category": 1e999}',
            b"{} {}",
            "\u2028".encode(),
        ]
    )
)

VOCABULARY = (
    "river mountain window garden letter number picture island morning evening school bridge "
    "market coffee teacher doctor summer winter engine planet forest village station library"
).split()


def row(line: int, question: str, answer: str, **message: Any) -> Row:
    messages = (
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer, **message},
    )
    return Row(line, "messages", messages, None, None, None)


def sentence(seed: int, words: int = 30) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=words))


def answer_of(line: int) -> str:
    return sentence(1000 + line, 10 + random.Random(line).randrange(30))


def good(count: int) -> list[Row]:
    """Rows that differ from each other in question and answer, in length too."""
    return [row(n + 1, sentence(n, 12), answer_of(n)) for n in range(count)]
