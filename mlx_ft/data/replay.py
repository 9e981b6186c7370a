"""Mix in the base model's own answers to ordinary prompts, asked once and cached.

Why: rows of one kind alone teach a model to answer in that kind always. Its own answers hold the
rest in place (Huang et al., arXiv 2403.01244, call it self-synthesized rehearsal).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mlx_ft.data.rows import FileRows, Row
from mlx_ft.model.chat import ChatFormat
from mlx_ft.model.resolve import ResolvedModel
from mlx_ft.recipe.schema import ChatRecipe, Recipe
from mlx_ft.system.cache import cache_home
from mlx_ft.system.console import Console
from mlx_ft.system.files import hash_of, read_json, write_json
from mlx_ft.text.repetition import degenerate_reason

PROMPTS_FILE = Path(__file__).with_name("replay_prompts.txt")
CATEGORY = "replay"


def replay_prompts() -> tuple[str, ...]:
    """Return the prompts: greetings, small talk, facts, sums, instructions, explanations."""
    return tuple(PROMPTS_FILE.read_text(encoding="utf-8").splitlines())


def prompts_sha256() -> str:
    """Return a hash of the prompts, on which the rows depend."""
    return hashlib.sha256(PROMPTS_FILE.read_bytes()).hexdigest()


def rows_wanted(rows: int, share: float) -> int:
    """Return how many rows must be added to so many for the added ones to be that share of all."""
    return max(1, round(rows * share / (1 - share)))


def replay_rows(answers: Mapping[str, str]) -> tuple[Row, ...]:
    """Return a row for each prompt and its answer; they stand in no file, so that their lines count
    down from -1.
    """
    return tuple(
        Row(
            line=-number,
            form="messages",
            messages=(
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ),
            text=None,
            tools=None,
            category=CATEGORY,
        )
        for number, (prompt, answer) in enumerate(answers.items(), start=1)
    )


# Raised when the same prompts would be asked in another way; answers are then asked for again.
REPLAY_VERSION = 1
MAX_TOKENS = 96
PROMPTS_AT_A_TIME = 16


def with_replay(
    read: Mapping[str, FileRows], recipe: Recipe, model: ResolvedModel, console: Console
) -> Mapping[str, FileRows]:
    """Return the rows of both splits, with the base model's own answers after the training rows.

    Unchanged when `data.replay` asks for none, or when a file has problems.
    """
    share = recipe.data.replay
    if share is None or any(file.problems for file in read.values()):
        return read
    train = read["train"]
    wanted = rows_wanted(len(train.rows), share)
    answers = base_answers(model, recipe.chat, wanted, console)
    if len(answers) < wanted:
        console.say(f"data.replay: {len(answers)} rows, there are no more for the {wanted} asked")
    return {**read, "train": replace(train, rows=(*train.rows, *replay_rows(answers)))}


def base_answers(
    model: ResolvedModel, chat: ChatRecipe, wanted: int, console: Console
) -> dict[str, str]:
    """Return prompt -> answer of the base for the first `wanted` prompts that it answers well.

    There may be fewer.
    """
    file = _cache_file(model, chat)
    answers = _read_answers(file)
    if _good(answers) < wanted and len(answers) < len(replay_prompts()):
        _ask(model, chat, wanted, answers, file, console)
    good = {prompt: answer for prompt, answer in answers.items() if answer is not None}
    return dict(list(good.items())[:wanted])


def _ask(
    model: ResolvedModel,
    chat: ChatRecipe,
    wanted: int,
    answers: dict[str, str | None],
    file: Path,
    console: Console,
) -> None:
    """Add answers to the prompts that have none yet until enough are good, a few at a time, and
    keep them in `file`.
    """
    from mlx_ft.engine.generate import Generation, generate
    from mlx_ft.engine.load import load_model, release

    def kept(generation: Generation) -> str | None:
        ended = generation.finish_reason == "stop"
        usable = ended and degenerate_reason(generation.text, generation.ids) is None
        return generation.text.strip() if usable else None

    loaded = load_model(model.path, ChatFormat.of(chat))
    file.parent.mkdir(parents=True, exist_ok=True)
    unasked = [prompt for prompt in replay_prompts() if prompt not in answers]
    with console.progress("asking the base model", wanted) as line:
        while unasked and _good(answers) < wanted:
            asked, unasked = unasked[:PROMPTS_AT_A_TIME], unasked[PROMPTS_AT_A_TIME:]
            ids = [
                loaded.renderer.prompt_ids([{"role": "user", "content": prompt}])
                for prompt in asked
            ]
            generations = generate(loaded, ids, max_tokens=MAX_TOKENS)
            answers.update(zip(asked, map(kept, generations), strict=True))
            write_json(file, answers)
            good = _good(answers)
            line.update(min(good, wanted), f"{good} answers, {len(answers)} prompts")
    del loaded
    release()


def _read_answers(file: Path) -> dict[str, str | None]:
    try:
        return dict(read_json(file))
    except (OSError, ValueError):  # not there yet, or torn
        return {}


def _good(answers: Mapping[str, str | None]) -> int:
    return sum(answer is not None for answer in answers.values())


def _cache_file(model: ResolvedModel, chat: ChatRecipe) -> Path:
    asked = [REPLAY_VERSION, MAX_TOKENS, prompts_sha256(), model.identity, chat.model_dump()]
    return cache_home() / "replay" / f"{hash_of(asked)}.json"
