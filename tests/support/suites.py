"""Suites of a few prompts."""

import json
from pathlib import Path


def write_suite(folder: Path, name: str, asked: list[tuple[str, str]]) -> str:
    """Write a suite of (category, question) pairs and return its path."""
    samples = [
        {
            "id": f"{name}-{number}",
            "category": category,
            "messages": [{"role": "user", "content": text}],
            "target": {"any_of": []},
        }
        for number, (category, text) in enumerate(asked)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    path = folder / f"{name}.yaml"
    path.write_text(f"name: {name}\nsamples: {name}.jsonl\nscorer: {{name: talk}}\nmax_tokens: 8\n")
    return str(path)
