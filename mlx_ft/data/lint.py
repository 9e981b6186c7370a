"""Twelve rules for suspicious rows: valid, but likely to be wrong.

Does: report rows, severity and advice. Each rule is a small pure function from rows to the lines it
hits; all are in RULES.
Does not: read files, change a row, or stop a run.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

from mlx_ft.data.rows import Row, calls_text, said, said_by_system, texts_of, thinks
from mlx_ft.system.console import Progress
from mlx_ft.text.near_duplicates import earlier_twins

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
    """A rule's result: in how many rows of how many, and the first lines of them."""

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


def _last(row: Row) -> Mapping[str, Any]:
    """Return the message of a row's last answer; of plain text, the text as one."""
    if row.messages is None:
        return {"content": row.text or ""}
    answers = [message for message in row.messages if message["role"] == "assistant"]
    return answers[-1] if answers else {"content": ""}


def _last_answer(row: Row) -> str:
    return str(_last(row)["content"])


def question(row: Row) -> str:
    """Return everything before a row's last answer."""
    messages = list(row.messages or ())
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return "\n".join(f"{m['role']}: {m['content']}{calls_text(m)}" for m in messages[:-1])


def _lines_where(rows: Iterable[Row], holds: Callable[[Row], bool]) -> list[int]:
    return [row.line for row in rows if holds(row)]


def _plain(text: str) -> str:
    """Return a text without case, spaces and end marks; `3 + 4` is not `3 * 4`."""
    return " ".join(text.casefold().split()).rstrip(".?! ")


CUT_END = re.compile(r"(\.\.\.|\u2026|\[truncated\]|\[\.\.\.\])\s*$")


def cut_answers(rows: Sequence[Row]) -> list[int]:
    return _lines_where(rows, lambda row: bool(CUT_END.search(_last_answer(row))))


# What whole answers end in: a sentence's mark, or what closes a bracket, a quotation or code.
WHOLE_END = tuple(".!?:;\u2026\u3002\uff01\uff1f)]}>\"'`\u2019\u201d\u00bb*|")


def one_length(rows: Sequence[Row]) -> list[int]:
    """Rows whose answers all have the longest length that occurs, character for character, and end
    in the middle of a sentence. Equal answers count once: they have one length for another reason.
    """
    longest = max((len(_last_answer(row)) for row in rows), default=0)

    def cut(row: Row) -> bool:
        answer = _last_answer(row)
        return len(answer) == longest and not answer.rstrip().endswith(WHOLE_END)

    count = len({_last_answer(row) for row in rows if cut(row)})
    if longest < LIMIT_CHARACTERS or count < max(LIMIT_ROWS, LIMIT_SHARE * len(rows)):
        return []
    return _lines_where(rows, cut)


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
        matcher = SequenceMatcher(None, one.split(), other.split(), autojunk=False)
        return matcher.quick_ratio() > NEARLY_EQUAL and matcher.ratio() > NEARLY_EQUAL

    return _lines_where(rows, copied)


def constant_answers(rows: Sequence[Row]) -> list[int]:
    counts = Counter(map(_given, rows))
    answer, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if count < max(CONSTANT_ROWS, CONSTANT_SHARE * len(rows)):
        return []
    return _lines_where(rows, lambda row: _given(row) == answer)


def _given(row: Row) -> str:
    """Return a row's last answer with the tools that it calls."""
    return _plain(_last_answer(row)) + calls_text(_last(row))


def duplicates(rows: Sequence[Row]) -> list[int]:
    """Rows that are equal to another row further up."""
    seen: set[tuple[str, ...]] = set()
    lines = []
    for row in rows:
        key = (_plain(question(row)), _given(row))
        if key in seen:
            lines.append(row.line)
        seen.add(key)
    return lines


def near_duplicates(rows: Sequence[Row]) -> list[int]:
    """Rows that share most runs of five words with a row further up but are not equal to it.

    Their system messages must be equal, or nearly.
    """
    exact = set(duplicates(rows))
    others = [row for row in rows if row.line not in exact]
    twins = earlier_twins([said(row) for row in others], [said_by_system(row) for row in others])
    return [row.line for row, twin in zip(others, twins, strict=True) if twin is not None]


def contradictions(rows: Sequence[Row]) -> list[int]:
    """Rows that ask the same as another row, with the same tools, and answer otherwise."""

    def asked(row: Row) -> tuple[str, str]:
        return _plain(question(row)), repr(row.tools)

    given: dict[tuple[str, str], set[str]] = defaultdict(set)
    talks = [row for row in rows if row.messages is not None]
    for row in talks:
        given[asked(row)].add(_given(row))
    return _lines_where(talks, lambda row: len(given[asked(row)]) > 1)


def some_think(rows: Sequence[Row]) -> list[int]:
    """Rows that think, when others do not."""
    lines = _lines_where(rows, thinks)
    return lines if 0 < len(lines) < len(rows) else []


TEMPLATE_MARKS = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end_header_id|begin_of_text)\|>"
    # <s> inside a text is HTML.
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|^\s*<s>|</s>\s*$"
)


def template_marks(rows: Sequence[Row]) -> list[int]:
    """Messages with marks, which the template adds once more; plain text is trained as it is."""
    return _lines_where(
        rows,
        lambda row: row.messages is not None and any(map(TEMPLATE_MARKS.search, texts_of(row))),
    )


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
        texts = [*texts_of(row), *map(calls_text, row.messages or ())]
        return any(map(SECRETS.search, texts))

    return _lines_where(rows, leaks)


# UTF-8 read as Latin-1 or Windows-1252, and the character for what could not be read.
MOJIBAKE = re.compile("\u00c3[\u0080-\u00bf\u0192\u201a-\u201e]|\u00e2\u20ac[\u0098-\u2122]|\ufffd")


def mojibake(rows: Sequence[Row]) -> list[int]:
    return _lines_where(rows, lambda row: any(MOJIBAKE.search(text) for text in answers(row)))


SORRY = (
    r"(?:(?:(?:i'?m|i am)(?: \w+)? sorry|sorry|(?:my )?apologies|i apologi[sz]e|unfortunately)"
    r"\W+(?:but |however,? )?)"
)
UNABLE = (
    r"i(?: can'?t|(?: simply)? cannot| can not| won'?t(?: be able to)?| will not"
    r"|(?:'?m| am) (?:unable|not able|not allowed) to| (?:must|have to) decline to) (?:\w+ly )?"
)
# After an apology, verbs refuse that need not do so without one.
SORRY_UNABLE = (
    r"(?:(?:do|answer) (?:that|this)|discuss|engage|participate|share|continue|support"
    r"|(?:create|generate|write|produce) (?:content|such|that|this))"
)
REFUSAL = re.compile(
    rf"^\W*(?:{SORRY}?{UNABLE}(?:help(?! but| \w+ing)|assist|comply|fulfil|provide)"
    rf"|{SORRY}{UNABLE}{SORRY_UNABLE}"
    rf"|{SORRY}?as an?(?: ai| large)? language model\b"
    rf"|{SORRY}?as an ai(?: model| assistant)?,? i\b)",
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


def lint(
    rows: Sequence[Row],
    off: Iterable[str] = (),
    progress: Progress | None = None,
) -> list[Hit]:
    """Return the hits of the rules, in their order.

    off: names of rules that are not applied.
    progress: shown before each rule; its total is 1.
    """
    silent = set(off)
    hits = []
    for index, rule in enumerate(RULES):
        if progress is not None:
            progress.update(index / len(RULES), f"looking for {rule.name}")
        lines = [] if rule.name in silent else rule.find(rows)
        if lines:
            first = tuple(lines[:LISTED_LINES])
            hits.append(
                Hit(rule.name, rule.severity, len(lines), len(rows), first, rule.found, rule.fix)
            )
    return hits


def without_hits(
    rows: Sequence[Row], names: Iterable[str]
) -> tuple[Sequence[Row], dict[str, list[int]]]:
    """Return the rows that none of the named rules hits, and the lines that each of them took.

    Rules are applied one after the other, each to the rows that are left.
    """
    wanted, taken = set(names), {}
    for rule in RULES:
        lines = rule.find(rows) if rule.name in wanted else []
        if lines:
            taken[rule.name], gone = lines, set(lines)
            rows = [row for row in rows if row.line not in gone]
    return rows, taken


def hits_json(hits: Sequence[Hit]) -> list[Mapping[str, Any]]:
    """Return the hits as plain JSON for stats.json."""
    return [vars(hit) | {"lines": list(hit.lines)} for hit in hits]
