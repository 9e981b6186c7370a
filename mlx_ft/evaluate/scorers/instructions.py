"""instructions: target, keys, rule. Checks length, language, words and form, as IFEval does.

Does: say which of several rules a text follows (arXiv 2311.07911). Does not: judge whether the text
answers the question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from mlx_ft.evaluate.scorers.keys import Count, ScorerKeys
from mlx_ft.evaluate.scorers.protocol import Given, Score, Scorer, right, wrong
from mlx_ft.evaluate.scorers.text import has_word, plain
from mlx_ft.evaluate.suite_keys import Filled
from mlx_ft.recipe.fields import Section
from mlx_ft.text.language import LANGUAGES, language_of
from mlx_ft.text.python_code import open_brackets


class Rules(Section):
    """The rules of an instructions target."""

    min_words: Count | None = None
    max_words: Count | None = None
    min_sentences: Count | None = None
    max_sentences: Count | None = None
    paragraphs: Count | None = None
    bullets: Count | None = None
    numbered: Count | None = None
    includes: list[Filled] | None = Field(None, min_length=1)
    excludes: list[Filled] | None = Field(None, min_length=1)
    starts_with: Filled | None = None
    ends_with: Filled | None = None
    language: Filled | None = None
    case: Literal["lower", "upper"] | None = None
    json_: Literal[True] | None = Field(None, alias="json")
    no_commas: Literal[True] | None = None
    quoted: Literal[True] | None = None
    title: Literal[True] | None = None

    @model_validator(mode="after")
    def _some_and_known(self) -> Rules:
        if not self.model_fields_set:
            raise ValueError("name at least one rule")
        if self.language is not None and self.language not in LANGUAGES:
            raise ValueError(f"language is none of {', '.join(LANGUAGES)}")
        return self


class InstructionsTarget(Section):
    """Target of instructions."""

    rules: Rules


class InstructionsKeys(ScorerKeys):
    """`scorer: {name: instructions}`"""

    name: Literal["instructions"]
    target = InstructionsTarget

    def build(self) -> Scorer:
        return Instructions()


@dataclass(frozen=True)
class Instructions(Scorer):
    """Rules that a text can be checked for. Target: {"rules": {rule: value, ...}}.

    The score is the share of rules that are followed, so 1.0 means all of them. `min_words`,
    `max_words`, `min_sentences`, `max_sentences`, `paragraphs` (parts between blank lines),
    `bullets` and `numbered` (lines that begin with -, * or a number) count; `includes` and
    `excludes` are lists of words or phrases, whole and in any case; `starts_with` and `ends_with`
    are texts, outer white space aside; `language` is a two-letter code; `case` is lower or upper;
    `json`, `no_commas`, `quoted` (in double quotes) and `title` (a line `# ...` or `<<...>>` at the
    top) are true where they must hold.
    """

    def judge(self, text: str, target: Mapping[str, Any], given: Given) -> Score:
        rules: Mapping[str, Any] = target["rules"]
        broken = [
            (name, found)
            for name, value in rules.items()
            if (found := RULES[name](text, value)) is not None
        ]
        if not broken:
            return right("", f"follows {len(rules)} of {len(rules)} rules")
        name, found = broken[0]
        others = "".join(f", {other}" for other, _ in broken[1:])
        reason = f"{found} ({name}{others})"
        return wrong("instruction", reason, "", 1 - len(broken) / len(rules))


MAX_OPEN_BRACKETS = 64
_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f]+(?=\s|$|[\"')\]])")
_BULLET = re.compile(r"(?m)^[ \t]*[-*\u2022][ \t]+\S")
_NUMBERED = re.compile(r"(?m)^[ \t]*\d{1,3}[.)][ \t]+\S")
_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")


def sentences_in(text: str) -> int:
    """Return the number of sentences in a text; an unfinished one counts, too."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    rest = text[ends[-1] :] if ends else text
    return len(ends) + any(character.isalnum() for character in rest)


def _at_least(count: Callable[[str], int], what: str) -> Callable[[str, Any], str | None]:
    def check(text: str, value: Any) -> str | None:
        found = count(text)
        return None if found >= value else f"{found} {what}"

    return check


def _at_most(count: Callable[[str], int], what: str) -> Callable[[str, Any], str | None]:
    def check(text: str, value: Any) -> str | None:
        found = count(text)
        return None if found <= value else f"{found} {what}"

    return check


def _exactly(count: Callable[[str], int], what: str) -> Callable[[str, Any], str | None]:
    def check(text: str, value: Any) -> str | None:
        found = count(text)
        return None if found == value else f"{found} {what}"

    return check


def _words(text: str) -> int:
    return len(text.split())


def _paragraphs(text: str) -> int:
    return len([part for part in _BLANK_LINES.split(text.strip()) if part.strip()])


def _bullets(text: str) -> int:
    return len(_BULLET.findall(text))


def _numbered(text: str) -> int:
    return len(_NUMBERED.findall(text))


def _includes(text: str, value: Any) -> str | None:
    words = plain(text)
    missing = [phrase for phrase in value if not has_word(words, phrase)]
    return f"no {missing[0]!r}" if missing else None


def _excludes(text: str, value: Any) -> str | None:
    words = plain(text)
    said = [phrase for phrase in value if has_word(words, phrase)]
    return f"says {said[0]!r}" if said else None


def _starts_with(text: str, value: Any) -> str | None:
    return None if text.strip().startswith(value) else "begins in another way"


def _ends_with(text: str, value: Any) -> str | None:
    return None if text.strip().endswith(value) else "ends in another way"


def _language(text: str, value: Any) -> str | None:
    found = language_of(text)
    return None if found == value else f"language {found or 'not known'}"


def _case(text: str, value: Any) -> str | None:
    same = text == (text.lower() if value == "lower" else text.upper())
    return None if same and any(c.isalpha() for c in text) else f"is not in {value} case"


def _json(text: str, value: Any) -> str | None:
    if open_brackets(text) > MAX_OPEN_BRACKETS:
        return "is not JSON"
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return "is not JSON"
    return None


def _no_commas(text: str, value: Any) -> str | None:
    return "has a comma" if re.search("[,\uff0c\u3001]", text) else None


def _quoted(text: str, value: Any) -> str | None:
    text = text.strip()
    inside = len(text) > 2 and (text[0], text[-1]) in (('"', '"'), ("\u201c", "\u201d"))
    return None if inside else "is not in double quotes"


def _title(text: str, value: Any) -> str | None:
    first = text.strip().split("\n", 1)[0].strip()
    is_title = re.match(r"#{1,6}\s+\S", first) or re.match(r"<<[^<>\n]{1,200}>>", first)
    return None if is_title else "has no title"


RULES: Mapping[str, Callable[[str, Any], str | None]] = {
    "min_words": _at_least(_words, "words"),
    "max_words": _at_most(_words, "words"),
    "min_sentences": _at_least(sentences_in, "sentences"),
    "max_sentences": _at_most(sentences_in, "sentences"),
    "paragraphs": _exactly(_paragraphs, "paragraphs"),
    "bullets": _exactly(_bullets, "bullets"),
    "numbered": _exactly(_numbered, "numbered lines"),
    "includes": _includes,
    "excludes": _excludes,
    "starts_with": _starts_with,
    "ends_with": _ends_with,
    "language": _language,
    "case": _case,
    "json": _json,
    "no_commas": _no_commas,
    "quoted": _quoted,
    "title": _title,
}
