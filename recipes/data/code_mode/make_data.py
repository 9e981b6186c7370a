"""Write train.jsonl and valid.jsonl: requests answered through execute_code, and ordinary talk.

Usage: python recipes/data/code_mode/make_data.py [--seed 0] [--out FOLDER]

Deterministic for a seed, standard library only. Wordings come from wordings.py, talk from talk.py,
paths, symbols and patterns from values.py. It knows nothing of the evaluation prompts:
tests/test_quickstart_data.py proves that the two share neither wording nor values.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talk import TALK, TALK_THEN_TOOL
from values import CODE_SUFFIXES, file_in, rename_pair, value
from wordings import (
    CLAUSES,
    CLOSERS,
    FRAGMENTS,
    JOINTS,
    OPENERS,
    PRONOUN_FRAGMENTS,
    REQUESTS,
)

Row = dict[str, Any]
Arguments = dict[str, str]


@dataclass(frozen=True)
class Tool:
    """One tool of the API: its name, its arguments in order, and the category of its requests."""

    name: str
    arguments: tuple[str, ...]
    category: str


TOOLS: tuple[Tool, ...] = (
    Tool("typecheck", ("path",), "check"),
    Tool("run_tests", ("path",), "check"),
    Tool("lint", ("path",), "check"),
    Tool("find_references", ("symbol",), "navigate"),
    Tool("goto_definition", ("symbol",), "navigate"),
    Tool("rename_symbol", ("old", "new"), "refactor"),
    Tool("read_file", ("path",), "read"),
    Tool("list_files", ("path",), "read"),
    Tool("git_diff", ("path",), "read"),
    Tool("grep", ("pattern", "path"), "search"),
)

# More where a blind set of requests showed confusion: used or defined, symbol or text, which name.
TRAIN_ROWS = {
    "find_references": 32,
    "goto_definition": 24,
    "read_file": 23,
    "grep": 35,
    "rename_symbol": 22,
}
TRAIN_ROWS_PER_OTHER_TOOL = 20
VALID_ROWS_PER_TOOL = 2
TRAIN_TWO_STEP_ROWS = 86
VALID_TWO_STEP_ROWS = 6
VALID_TALK_ROWS = 14


# What people ask for together; half of the two-call requests are of these.
NATURAL_PAIRS: tuple[tuple[str, str], ...] = (
    ("list_files", "read_file"),
    ("list_files", "git_diff"),
    ("grep", "read_file"),
    ("rename_symbol", "grep"),
    ("rename_symbol", "run_tests"),
    ("find_references", "rename_symbol"),
    ("goto_definition", "find_references"),
    ("lint", "run_tests"),
    ("typecheck", "lint"),
    ("read_file", "git_diff"),
    ("git_diff", "run_tests"),
    ("run_tests", "typecheck"),
)


def fill_in(rng: random.Random, tool: Tool) -> Arguments:
    """Values for all arguments of a tool."""
    if tool.name == "rename_symbol":
        old, new = rename_pair(rng)
        return {"old": old, "new": new}
    return {name: value(rng, tool.name, name) for name in tool.arguments}


def in_words(arguments: Arguments) -> Arguments:
    """The arguments as they appear in a request: between backticks, as developers write code.

    So a value is the same run of tokens in the request and in the call, which is what a model of
    this size can learn to copy from a few hundred rows; a bare word carries a leading space.
    """
    return {name: f"`{text}`" for name, text in arguments.items()}


def call(tool: Tool, arguments: Arguments) -> str:
    """The Python call, keyword arguments in double quotes."""
    written = ", ".join(f'{name}="{arguments[name]}"' for name in tool.arguments)
    return f"{tool.name}({written})"


def wrapped(calls: list[str]) -> str:
    """The assistant's answer: the calls, one a line, inside execute_code."""
    return 'execute_code("""' + "\n".join(calls) + '""")'


def lower_first(text: str) -> str:
    """The text with a small first letter, unless it starts with a value or with `I`."""
    return text if text.startswith(("{", "I ", "I'")) else text[0].lower() + text[1:]


def dressed(rng: random.Random, request: str) -> str:
    """A wording with context before or after it, or typed carelessly; slots are still open."""
    if rng.random() < 0.25 and not re.search(r"[.?!,;:]", request):
        request += f"{rng.choice((' ', ' ', ', '))}{rng.choice(CLAUSES)}"
    if request[-1] not in ".?!" and rng.random() < 0.35:
        request += "."
    chance = rng.random()
    if chance < 0.18:
        opener = rng.choice(OPENERS)
        return f"{opener} {request if opener[-1] in '.!' else lower_first(request)}"
    if chance < 0.28:
        return f"{request}{'' if request[-1] in '.?!' else '.'} {rng.choice(CLOSERS)}"
    if chance < 0.45:
        return lower_first(request).rstrip(".?!")
    return request


def single_step(rng: random.Random, tool: Tool, wording: str) -> Row:
    """A request for one call."""
    arguments = fill_in(rng, tool)
    request = dressed(rng, wording).format(**in_words(arguments))
    return row(request, wrapped([call(tool, arguments)]), tool.category)


def two_step(rng: random.Random, joint: str) -> Row:
    """A request for two calls; a third of them say `it` for the path of the first call."""
    if rng.random() < 0.33:
        first, second = rng.sample([t for t in TOOLS if t.name in PRONOUN_FRAGMENTS], 2)
        arguments = {"path": file_in(rng, CODE_SUFFIXES)}
        pair = (arguments, arguments)
        second_words = rng.choice(PRONOUN_FRAGMENTS[second.name])
    else:
        first, second = two_tools(rng)
        before = fill_in(rng, first)
        pair = (before, follow_up(rng, second, before))
        second_words = rng.choice(FRAGMENTS[second.name]).format(**in_words(pair[1]))
    first_words = rng.choice(FRAGMENTS[first.name]).format(**in_words(pair[0]))
    request = joint.format(first=first_words, second=second_words)
    if joint.startswith("{") and rng.random() < 0.6:
        request = request[0].upper() + request[1:]
    answer = wrapped([call(first, pair[0]), call(second, pair[1])])
    return row(request, answer, "multi_step")


def two_tools(rng: random.Random) -> tuple[Tool, Tool]:
    """Two tools for one request, half of the time two that people use together."""
    if rng.random() < 0.5:
        first, second = rng.sample(TOOLS, 2)
        return first, second
    by_name = {tool.name: tool for tool in TOOLS}
    one, other = rng.choice(NATURAL_PAIRS)
    return by_name[one], by_name[other]


def follow_up(rng: random.Random, tool: Tool, before: Arguments) -> Arguments:
    """Values for a second call; most are about what the call before it named.

    A name is searched for again, a path is used again, a file lies in the folder just listed.
    """
    arguments = fill_in(rng, tool)
    if rng.random() < 0.4 or tool.name == "rename_symbol":
        return arguments
    names = [before[key] for key in ("symbol", "old", "new") if key in before]
    for key in ("symbol", "pattern"):
        if names and key in arguments:
            arguments[key] = rng.choice(names)
    if "path" in before and "path" in arguments:
        is_folder = "." not in before["path"]
        if is_folder and tool.name not in ("list_files", "run_tests"):
            file = file_in(rng, CODE_SUFFIXES).rsplit("/", 1)[-1]
            arguments["path"] = before["path"].rstrip("/") + "/" + file
        elif not is_folder and tool.name == "grep":
            arguments["path"] = before["path"]
    return arguments


def row(request: str, answer: str, category: str) -> Row:
    """One exchange as a row of the data file."""
    return conversation((request, answer), category)


def conversation(turns: tuple[str, ...], category: str) -> Row:
    """User and assistant turns, alternating, as a row of the data file."""
    messages = [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)
    ]
    return {"messages": messages, "category": category}


def after(opening: tuple[str, str], request: Row) -> Row:
    """The request as the second exchange of a conversation."""
    messages = [*conversation(opening, "talk")["messages"], *request["messages"]]
    return {"messages": messages, "category": request["category"]}


def cycle_shuffled(rng: random.Random, items: tuple[str, ...]) -> Iterator[str]:
    """The items in random order, each once before any of them comes again."""
    while True:
        yield from rng.sample(items, len(items))


def make_rows(seed: int) -> tuple[list[Row], list[Row]]:
    """Training and validation rows for a seed."""
    rng = random.Random(seed)
    train: list[Row] = []
    valid: list[Row] = []
    for tool in TOOLS:
        wordings = cycle_shuffled(rng, REQUESTS[tool.name])
        count = TRAIN_ROWS.get(tool.name, TRAIN_ROWS_PER_OTHER_TOOL)
        train += [single_step(rng, tool, next(wordings)) for _ in range(count)]
        valid += [single_step(rng, tool, next(wordings)) for _ in range(VALID_ROWS_PER_TOOL)]
    joints = cycle_shuffled(rng, JOINTS)
    train += [two_step(rng, next(joints)) for _ in range(TRAIN_TWO_STEP_ROWS)]
    valid += [two_step(rng, next(joints)) for _ in range(VALID_TWO_STEP_ROWS)]
    for opening in TALK_THEN_TOOL:
        tool = rng.choice(TOOLS)
        request = single_step(rng, tool, rng.choice(REQUESTS[tool.name]))
        train.append(after(opening, request))
    talk = [conversation(turns, "talk") for turns in rng.sample(TALK, len(TALK))]
    valid += talk[:VALID_TALK_ROWS]
    train += talk[VALID_TALK_ROWS:]
    rng.shuffle(train)
    rng.shuffle(valid)
    return train, valid


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    for name, rows in zip(("train", "valid"), make_rows(options.seed), strict=True):
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        (options.out / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        print(f"{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
