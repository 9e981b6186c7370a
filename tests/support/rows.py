"""Training rows of mixed length."""

import json
from pathlib import Path


def write_rows(folder: Path, train: int = 24, valid: int = 6) -> Path:
    """Write train.jsonl and valid.jsonl with chat rows of mixed length into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    words = "quick brown fox jumps over lazy dog files tests tools Paris France hello".split()
    for name, count, offset in (("train", train, 0), ("valid", valid, 1000)):
        lines = []
        for index in range(offset, offset + count):
            question = " ".join(words[(index * 7 + k) % len(words)] for k in range(2 + index % 9))
            answer = " ".join(words[(index * 5 + k) % len(words)] for k in range(1 + index % 5))
            messages = [
                {"role": "user", "content": f"{question} {index}"},
                {"role": "assistant", "content": answer},
            ]
            lines.append(json.dumps({"messages": messages, "category": words[index % 3]}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
