"""How long 50,000 rows take to be checked, in how much memory: `mlx-ft check` as a user runs it.

Rows are runs of words from docstrings of the standard library, so that their words are as frequent
as words are; one in a hundred repeats an earlier row with a few words changed.

Usage: python -m tests.benchmarks.rows [--rows 50000] [--tokens 200] [--work DIR]
"""

import argparse
import json
import random
import sys
from pathlib import Path

import yaml

import mlx_ft  # noqa: F401  # first: it loads OpenBLAS before mlx is imported
from tests.benchmarks.docstrings import docstrings
from tests.benchmarks.training import timed

NEARLY_AGAIN = 0.01
WORDS_A_TOKEN = 0.62


def words_of_docstrings() -> list[str]:
    """Return all words of the standard library's docstrings in their order."""
    return [word for _, text in docstrings() for word in text.split()]


def write_rows(folder: Path, rows: int, tokens: int) -> None:
    """Write `train.jsonl` with chat rows of about so many tokens each."""
    drawn = random.Random(0)
    words = words_of_docstrings()
    length = round(tokens * WORDS_A_TOKEN)
    folder.mkdir(parents=True, exist_ok=True)
    earlier: list[list[str]] = []
    with (folder / "train.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(rows):
            if earlier and drawn.random() < NEARLY_AGAIN:
                text = list(drawn.choice(earlier))
                text[drawn.randrange(length)] = "otherwise"
            else:
                text = []
                while len(text) < length:
                    start = drawn.randrange(len(words) - 20)
                    text += words[start : start + drawn.randrange(4, 12)]
                text = text[:length]
                earlier.append(text)
            cut = drawn.randrange(5, length // 2)
            question, answer = " ".join(text[:cut]), " ".join(text[cut:]) + "."
            messages = [
                {"role": "user", "content": f"{question} ({number})"},
                {"role": "assistant", "content": answer},
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path("bench-rows"))
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    if not (work / "data" / "train.jsonl").exists():
        write_rows(work / "data", arguments.rows, arguments.tokens)
    recipe = {
        "name": "rows",
        "model": "smollm2-135m-instruct",
        "data": {"path": str(work / "data"), "holdout": 0.05},
        "train": {"num_layers": 8},
    }
    (work / "rows.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "mlx_ft", "check", str(work / "rows.yaml")]
    seconds, peak_bytes = timed([*command, "--runs", str(work / "runs")], work / "rows.log")
    (stats,) = work.glob("runs/*/data/stats.json")
    splits = json.loads(stats.read_text(encoding="utf-8"))["splits"]
    tokens = sum(split["tokens"] for split in splits.values())
    print(
        f"{arguments.rows:,} rows, {tokens:,} tokens: {seconds:.1f} s, "
        f"{peak_bytes / 1e9:.2f} GB resident at the peak; see {work / 'rows.log'}"
    )


if __name__ == "__main__":
    main()
