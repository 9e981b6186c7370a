"""Rows of mixed length that any Python machine has: docstrings of the standard library.

Does: collect (request, docstring) pairs in a fixed order and write a seeded choice of them as
conversations. Does not: pick them by length, or know who trains on them.
"""

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

SHORTEST, LONGEST = 40, 3500  # characters of a docstring
Documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield (what it is, docstring) of the standard library's functions and classes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.parts):
            continue
        module = ".".join(path.relative_to(folder).with_suffix("").parts)
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, Documented):
                continue
            text = ast.get_docstring(node)
            if text and SHORTEST <= len(text) <= LONGEST:
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                yield f"the {kind} {module}.{node.name}", text


def write_rows(
    folder: Path, train_rows: int, valid_rows: int, test_rows: int = 0, seed: int = 0
) -> None:
    """Write train.jsonl, valid.jsonl and, if asked for, test.jsonl, drawn without repetition."""
    wanted = {"train": train_rows, "valid": valid_rows, "test": test_rows}
    chosen = iter(random.Random(seed).sample(sorted(set(docstrings())), sum(wanted.values())))
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: list(islice(chosen, rows)) for name, rows in wanted.items() if rows}
    for name, rows in parts.items():
        lines = [
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": f"Write the docstring of {what}."},
                        {"role": "assistant", "content": text},
                    ]
                }
            )
            for what, text in rows
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
