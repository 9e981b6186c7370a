"""Training rows that hold what the evaluation asks: then it measures memory.

Does: compare prompts with rows, word for word and by runs of 13 words. Does not: read suites or
files, or judge what to do about it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlx_ft.data.formats import Row
from mlx_ft.data.sketch import words_of

# Brown et al., arXiv 2005.14165, appendix C, call a test example dirty at 13 words in common.
RUN_WORDS = 13


@dataclass(frozen=True)
class Contamination:
    """A prompt that a training row holds: as its question (`whole`), or a run of its words."""

    prompt: str
    line: int
    whole: bool


def _runs(words: Sequence[str]) -> Iterator[str]:
    for start in range(len(words) - RUN_WORDS + 1):
        yield " ".join(words[start : start + RUN_WORDS])


def contaminated_prompts(rows: Sequence[Row], prompts: Mapping[str, str]) -> list[Contamination]:
    """Return, for each prompt (name to text) that some row holds, the first such row."""
    whole: dict[str, list[str]] = defaultdict(list)
    by_run: dict[str, set[str]] = defaultdict(set)
    for name, text in prompts.items():
        words = words_of(text)
        if words:
            whole[" ".join(words)].append(name)
        for run in _runs(words):
            by_run[run].add(name)
    found: dict[str, Contamination] = {}
    for row in rows:
        messages = row.messages or ()
        for message in messages:
            if message["role"] == "user":
                for name in whole.get(" ".join(words_of(str(message["content"]))), ()):
                    if name not in found or not found[name].whole:
                        found[name] = Contamination(name, row.line, whole=True)
        if by_run:
            texts = [row.text or "", *(str(message["content"] or "") for message in messages)]
            for run in (run for text in texts for run in _runs(words_of(text))):
                for name in by_run.get(run, ()):
                    found.setdefault(name, Contamination(name, row.line, whole=False))
    return [found[name] for name in prompts if name in found]
