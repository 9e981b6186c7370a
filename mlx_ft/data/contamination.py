"""Find training rows that contain evaluation prompts; such prompts measure memory.

Does: compare prompts with rows, word for word and by runs of 13 words.
Does not: read suites or files, or decide what follows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_ft.data.rows import Row, texts_of
from mlx_ft.text.near_duplicates import word_runs, words_of

# Brown et al., arXiv 2005.14165, appendix C, call a test example dirty at 13 words in common.
RUN_WORDS = 13


@dataclass(frozen=True)
class Contamination:
    """A prompt that a training row holds: as its question (`whole`), or a run of its words."""

    prompt: str
    line: int
    whole: bool


def last_question(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the user's last message, or ""; a tool's result may follow it."""
    questions = [message["content"] for message in messages if message["role"] == "user"]
    return str(questions[-1] or "") if questions else ""


def contaminated_prompts(rows: Sequence[Row], prompts: Mapping[str, str]) -> list[Contamination]:
    """Return, for each prompt (name to text) that some row holds, the first such row."""
    whole: dict[str, list[str]] = defaultdict(list)
    by_run: dict[str, set[str]] = defaultdict(set)
    for name, text in prompts.items():
        words = words_of(text)
        if words:
            whole[" ".join(words)].append(name)
        for run in word_runs(words, RUN_WORDS):
            by_run[run].add(name)
    found: dict[str, Contamination] = {}
    for row in rows:
        for message in row.messages or ():
            if message["role"] == "user":
                for name in whole.get(" ".join(words_of(str(message["content"]))), ()):
                    if name not in found or not found[name].whole:
                        found[name] = Contamination(name, row.line, whole=True)
        if by_run:
            words_of_texts = map(words_of, texts_of(row))
            for run in (run for words in words_of_texts for run in word_runs(words, RUN_WORDS)):
                for name in by_run.get(run, ()):
                    found.setdefault(name, Contamination(name, row.line, whole=False))
    return [found[name] for name in prompts if name in found]
