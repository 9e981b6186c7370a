"""What looks wrong in the training rows although each of them is valid.

Does: look for truncated, constant, copied, doubled, contradicting, refused, leaked and garbled
answers, and say which rows, how serious and what to do. Does not: read files, change a row, or stop
anything.

Every rule is a small pure function from the rows to the lines it hits, and all are in RULES.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

from mlx_ft.data.formats import Row, said
from mlx_ft.data.sketch import earlier_twins, words_of

Severity = Literal["warn", "fail"]
LISTED_LINES = 20
# An answer length is suspicious when it is the longest there is, long enough to be a limit, and
# shared by so many rows and such a share of them.
LIMIT_CHARACTERS, LIMIT_ROWS, LIMIT_SHARE = 100, 5, 0.05
# One answer to so many rows and such a share of them is no answer.
CONSTANT_ROWS, CONSTANT_SHARE = 10, 0.5
NEARLY_EQUAL = 0.9
# Shorter texts are equal too easily.
COMPARED_CHARACTERS = 20


@dataclass(frozen=True)
class Rule:
    """One rule: `find` returns the lines it hits, each once, in file order."""

    name: str
    severity: Severity
    found: str
    fix: str
    find: Callable[[Sequence[Row]], list[int]]


@dataclass(frozen=True)
class Hit:
    """What a rule found: in how many rows of how many, and the first lines of them."""

    rule: str
    severity: Severity
    count: int
    rows: int
    lines: tuple[int, ...]
    found: str
    fix: str


def answers(row: Row) -> list[str]:
    """Return the texts of a row that are trained: the assistant's, or the plain text."""
    if row.messages is None:
        return [row.text or ""]
    return [str(m["content"]) for m in row.messages if m["role"] == "assistant" and m["content"]]


def question(row: Row) -> str:
    """Return what a row's last answer answers: everything before it."""
    messages = list(row.messages or ())
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages[:-1])


def _last_answer(row: Row) -> str:
    texts = answers(row)
    return texts[-1] if texts else ""


def _lines_where(rows: Iterable[Row], holds: Callable[[Row], bool]) -> list[int]:
    return [row.line for row in rows if holds(row)]


def _plain(text: str) -> str:
    return " ".join(words_of(text))


CUT_END = re.compile(r"(\.\.\.|\u2026|\[truncated\]|\[\.\.\.\])\s*$")


def cut_answers(rows: Sequence[Row]) -> list[int]:
    return _lines_where(rows, lambda row: bool(CUT_END.search(_last_answer(row))))


def one_length(rows: Sequence[Row]) -> list[int]:
    """Rows whose answers all have the longest length that occurs, character for character."""
    lengths = Counter(len(_last_answer(row)) for row in rows)
    longest = max(lengths, default=0)
    count = lengths[longest]
    if longest < LIMIT_CHARACTERS or count < max(LIMIT_ROWS, LIMIT_SHARE * len(rows)):
        return []
    return _lines_where(rows, lambda row: len(_last_answer(row)) == longest)


def copied_questions(rows: Sequence[Row]) -> list[int]:
    def copied(row: Row) -> bool:
        if row.messages is None:
            return False
        users = [str(m["content"]) for m in row.messages if m["role"] == "user"]
        one, other = _plain(users[-1] if users else ""), _plain(_last_answer(row))
        if min(len(one), len(other)) < COMPARED_CHARACTERS:
            return False
        if one == other:
            return True
        if min(len(one), len(other)) < NEARLY_EQUAL * max(len(one), len(other)):
            return False
        matcher = SequenceMatcher(None, one, other, autojunk=False)
        return matcher.quick_ratio() > NEARLY_EQUAL and matcher.ratio() > NEARLY_EQUAL

    return _lines_where(rows, copied)


def constant_answers(rows: Sequence[Row]) -> list[int]:
    counts = Counter(_plain(_last_answer(row)) for row in rows)
    answer, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if count < max(CONSTANT_ROWS, CONSTANT_SHARE * len(rows)):
        return []
    return _lines_where(rows, lambda row: _plain(_last_answer(row)) == answer)


def duplicates(rows: Sequence[Row]) -> list[int]:
    """Rows whose words another row, further up, has in the same order."""
    seen: set[tuple[str, ...]] = set()
    lines = []
    for row in rows:
        key = (_plain(question(row)), *(_plain(text) for text in answers(row)), _calls(row))
        if key in seen:
            lines.append(row.line)
        seen.add(key)
    return lines


def _calls(row: Row) -> str:
    return repr([m.get("tool_calls") for m in row.messages or () if m.get("tool_calls")])


def near_duplicates(rows: Sequence[Row]) -> list[int]:
    """Rows that share most runs of five words with a row further up but are not equal to it, the
    system's words left aside.
    """
    exact = set(duplicates(rows))
    others = [row for row in rows if row.line not in exact]
    twins = earlier_twins([said(row) for row in others])
    return [row.line for row, twin in zip(others, twins, strict=True) if twin is not None]


def contradictions(rows: Sequence[Row]) -> list[int]:
    """Rows that ask what another row asks and answer otherwise."""
    given: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.messages is not None:
            given[_plain(question(row))].add(_plain(_last_answer(row)) + _calls(row))
    return _lines_where(
        rows, lambda row: row.messages is not None and len(given[_plain(question(row))]) > 1
    )


THINKING = "<think>"


def some_think(rows: Sequence[Row]) -> list[int]:
    """Rows that think, when others do not."""

    def thinks(row: Row) -> bool:
        reasons = any(m.get("reasoning_content") for m in row.messages or ())
        return reasons or any(THINKING in text for text in answers(row))

    lines = _lines_where(rows, thinks)
    return lines if 0 < len(lines) < len(rows) else []


TEMPLATE_MARKS = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end_header_id|begin_of_text)\|>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</?s>"
)


def template_marks(rows: Sequence[Row]) -> list[int]:
    def marked(row: Row) -> bool:
        texts = [row.text or ""] + [str(m.get("content") or "") for m in row.messages or ()]
        return any(TEMPLATE_MARKS.search(text) for text in texts)

    return _lines_where(rows, marked)


SECRETS = re.compile(
    r"-----BEGIN (?:RSA |EC |OPENSSH |DSA )?PRIVATE KEY-----"
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{36,}\b"
    r"|\bhf_[A-Za-z0-9]{30,}\b"
    r"|\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}\b"
    r"|\bxox[abprs]-[A-Za-z0-9-]{20,}\b"
    r"|\bAIza[0-9A-Za-z_-]{35}\b"
)


def secrets(rows: Sequence[Row]) -> list[int]:
    def leaks(row: Row) -> bool:
        texts = [row.text or ""] + [str(m.get("content") or "") for m in row.messages or ()]
        return any(SECRETS.search(text) for text in [*texts, _calls(row)])

    return _lines_where(rows, leaks)


# UTF-8 read as Latin-1 or Windows-1252, and the character for what could not be read.
MOJIBAKE = re.compile("\u00c3[\u0080-\u00bf\u0192\u201a-\u201e]|\u00e2\u20ac[\u0098-\u2122]|\ufffd")


def mojibake(rows: Sequence[Row]) -> list[int]:
    return _lines_where(rows, lambda row: any(MOJIBAKE.search(text) for text in answers(row)))


REFUSAL = re.compile(
    r"^\W*(?:i'?m sorry,? but|i am sorry,? but|sorry,? (?:but )?i (?:can'?t|cannot)|"
    r"i (?:can'?t|cannot|am unable to|'m unable to) (?:help|assist|comply|fulfil|provide)|"
    r"as an ai (?:language )?model)",
    re.IGNORECASE,
)


def refusals(rows: Sequence[Row]) -> list[int]:
    straight = str.maketrans("\u2019", "'")
    return _lines_where(
        rows, lambda row: bool(REFUSAL.search(_last_answer(row).translate(straight)))
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "cut-answers",
        "warn",
        "answers end in an ellipsis, as shortened ones do",
        "train whole answers, or remove the rows",
        cut_answers,
    ),
    Rule(
        "one-length",
        "fail",
        "answers have exactly the longest length that occurs, as if cut there",
        "train whole answers: something upstream limits their length",
        one_length,
    ),
    Rule(
        "copied-questions",
        "warn",
        "answers are nearly the question itself",
        "check which field the answer comes from",
        copied_questions,
    ),
    Rule(
        "constant-answers",
        "warn",
        "rows have one and the same answer",
        "check for a default that filled missing answers",
        constant_answers,
    ),
    Rule("duplicates", "warn", "rows repeat an earlier row", "keep one of each", duplicates),
    Rule(
        "near-duplicates",
        "warn",
        "rows share most of their words, in runs of five, with an earlier row",
        "keep one of each family, on one side of the split",
        near_duplicates,
    ),
    Rule(
        "contradictions",
        "warn",
        "rows ask the same and answer differently",
        "keep the answer that is wanted",
        contradictions,
    ),
    Rule(
        "some-think",
        "warn",
        "rows think, the others do not",
        "write all rows for one chat.enable_thinking",
        some_think,
    ),
    Rule(
        "template-marks",
        "fail",
        "texts hold marks of a chat template",
        "store what was said, the template adds its marks",
        template_marks,
    ),
    Rule(
        "secrets",
        "fail",
        "rows hold what looks like a key or token",
        "remove it, and revoke it",
        secrets,
    ),
    Rule(
        "mojibake",
        "warn",
        "answers were read in a wrong encoding once",
        "repair them (ftfy does), or read the source as UTF-8",
        mojibake,
    ),
    Rule(
        "refusals",
        "warn",
        "answers refuse or speak of a language model",
        "remove them unless refusing is what you train",
        refusals,
    ),
)


def lint(rows: Sequence[Row], off: Iterable[str] = ()) -> list[Hit]:
    """Return what the rules find, in their order; `off` names rules that are not asked."""
    silent = set(off)
    hits = []
    for rule in RULES:
        lines = [] if rule.name in silent else rule.find(rows)
        if lines:
            first = tuple(lines[:LISTED_LINES])
            hits.append(
                Hit(rule.name, rule.severity, len(lines), len(rows), first, rule.found, rule.fix)
            )
    return hits


def hits_json(hits: Sequence[Hit]) -> list[Mapping[str, Any]]:
    """Return the hits as plain JSON for stats.json."""
    return [vars(hit) | {"lines": list(hit.lines)} for hit in hits]
