"""Does the score of a few prompts choose better weights than validation loss, where single runs are
unreliable?

The quickstart, weakened (few layers, a constant and high rate, half its updates), over several
seeds, with and without extra weight on the wrapper's tokens. Each seed is trained once and looked
at several times on the way; three rules then choose among the same weights: the score on prompts of
code_mode, the validation loss, and the last ones. What they chose is scored on requests that
neither rows nor rules have seen (code_mode_wild). What is finished is not done again.

Usage: python -m tests.benchmarks.selection [--seeds 6] [--prompts 120] [--work bench-selection]
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mlx_ft.errors import GateFailed
from mlx_ft.evaluate.checkpoint_prompts import chooser
from mlx_ft.evaluate.harness import evaluate_column
from mlx_ft.evaluate.local_model import loaded_column
from mlx_ft.evaluate.stats import wilson_interval
from mlx_ft.evaluate.suites import Suite, load_suite
from mlx_ft.inputs import OpenRun, open_run
from mlx_ft.job import Job
from mlx_ft.model.chat import ChatFormat
from mlx_ft.pipeline import run_pipeline
from mlx_ft.recipe.load import load_recipe
from mlx_ft.system.cache import cache_home
from mlx_ft.system.console import Console
from mlx_ft.system.files import read_json_lines

RECIPE = Path("recipes/quickstart.yaml")
UNSEEN = Path("evals/code_mode_wild.yaml")
LOOKS, ITERATIONS = 8, 112
WRAPPER = r'execute_code\("""|"""\)'
SETTINGS = (
    "train.epochs=null",
    f"train.iters={ITERATIONS}",
    "train.num_layers=6",
    "train.learning_rate=8e-4",
    "train.lr_schedule={name: constant, warmup_ratio: 0.1}",
    f"train.steps_per_eval={ITERATIONS // LOOKS}",
    "train.select={suite: evals/code_mode.yaml, limit: 24}",
    f"train.save_every={ITERATIONS // LOOKS}",
    f"train.keep_checkpoints={LOOKS}",
    "eval={suites: []}",
)
WEIGHTINGS = {
    "plain": "data.loss_weights=[]",
    "wrapper x 4": f"data.loss_weights=[{{regex: {json.dumps(WRAPPER)}, weight: 4}}]",
}
# From here on a seed counts as having learned to answer through the wrapper.
GATE = 0.5


@dataclass(frozen=True)
class Look:
    """Weights on the way: their iteration, score on the prompts that choose, validation loss."""

    iteration: int
    score: float
    loss: float


RULES: dict[str, Callable[[Sequence[Look]], Look]] = {
    "task score": lambda looks: max(looks, key=lambda look: (look.score, -look.loss)),
    "validation loss": lambda looks: min(looks, key=lambda look: look.loss),
    "the last": lambda looks: looks[-1],
}


def open_seed(work: Path, weighting: str, seed: int, console: Console) -> OpenRun:
    sets = (*SETTINGS, WEIGHTINGS[weighting], f"train.seed={seed}", "name=selection")
    return open_run(load_recipe(RECIPE, sets), work / "runs", console)


def train(opened: OpenRun) -> list[Look]:
    """Train a seed, or find it trained, and return what it was on the way."""
    job = opened.job
    folder = job.folder / "train"
    try:
        run_pipeline(opened, "train")
    except GateFailed:  # what it says loops; it still counts, as a seed that was no good
        folder = job.folder / "train.tmp"
    lines = read_json_lines(folder / "metrics.jsonl")
    return [
        Look(line["iteration"], line["score"], line["validation_loss"])
        for line in lines
        if line["kind"] == "selection"
    ]


def measure(job: Job, look: Look, unseen: Suite, console: Console) -> float:
    """Return the mean score of weights on unseen prompts; answers are kept."""
    from mlx_ft.engine.load import load_model, release

    folder = job.folder / ("train" if (job.folder / "train").exists() else "train.tmp")
    adapter = folder / "checkpoints" / f"{look.iteration:07d}"
    loaded = load_model(job.model.path, ChatFormat.of(job.recipe.chat), adapter=adapter)
    with console.progress(f"unseen, iteration {look.iteration}", len(unseen.samples)) as line:
        sha256 = f"{job.inputs['train']}, {look.iteration}"
        (result,) = evaluate_column(
            [unseen],
            loaded_column(f"{look.iteration:07d}", loaded, sha256, batch_size=16),
            job.folder / "unseen",
            progress=line,
        )
    del loaded
    release()
    return float(result.summary["mean"])


def seed_entry(opened: OpenRun, unseen: Suite, console: Console) -> dict[str, Any]:
    """Return, for each rule, what it chose and what that scores."""
    job = opened.job
    looks = train(opened)
    scores: dict[int, float] = {}
    entry: dict[str, Any] = {"looks": [vars(look) for look in looks]}
    for rule, choose in RULES.items():
        look = choose(looks)
        if look.iteration not in scores:
            scores[look.iteration] = measure(job, look, unseen, console)
        entry[rule] = {"iteration": look.iteration, "unseen": scores[look.iteration]}
    return entry


def mean_words(values: Sequence[float]) -> str:
    deviation = f" (sd {stdev(values):.3f})" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{deviation}, {min(values):.3f} to {max(values):.3f}"


def report(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Return the tables: every seed, each rule's summary, and the difference of the first two."""
    lines = ["| loss | seed | rule | iteration | unseen |", "|---|---|---|---|---|"]
    for weighting, seeds in results.items():
        for seed, entry in seeds.items():
            for rule in RULES:
                chosen = entry[rule]
                figures = f"{chosen['iteration']} | {chosen['unseen']:.3f}"
                lines.append(f"| {weighting} | {seed} | {rule} | {figures} |")
    lines += ["", "| loss | rule | unseen: mean, ends | best seed's | reached the gate |"]
    lines += ["|---|---|---|---|---|"]
    for weighting, seeds in results.items():
        for rule in RULES:
            values = [entry[rule]["unseen"] for entry in seeds.values()]
            count = sum(value >= GATE for value in values)
            low, high = wilson_interval(count / len(values), len(values))
            reached = f"{count} of {len(values)} ({low:.2f} to {high:.2f})"
            cells = (weighting, rule, mean_words(values), f"{max(values):.3f}", reached)
            lines.append(f"| {' | '.join(cells)} |")
    first, second, *_ = RULES
    lines.append("")
    for weighting, seeds in results.items():
        differences = [e[first]["unseen"] - e[second]["unseen"] for e in seeds.values()]
        error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
        lines.append(
            f"{weighting}: {first} less {second}, {fmean(differences):+.3f} on {len(differences)} "
            f"seeds (standard error {error:.3f})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=120, help="unseen ones")
    parser.add_argument("--work", type=Path, default=Path("bench-selection"))
    arguments = parser.parse_args()
    console = Console()
    console.say(f"outputs of frozen layers are kept in {cache_home() / 'prefix'}")
    unseen = chooser(
        load_recipe(
            RECIPE, [f"train.select={{suite: {UNSEEN}, limit: {arguments.prompts}}}"]
        ).recipe.train.select
    )
    assert unseen is not None and len(unseen.samples) <= len(load_suite(UNSEEN).samples)
    results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in WEIGHTINGS}
    for seed in range(arguments.seeds):
        for weighting in WEIGHTINGS:
            opened = open_seed(arguments.work, weighting, seed, console)
            results[weighting][seed] = seed_entry(opened, unseen, console)
            whole = {name: seeds for name, seeds in results.items() if seeds}
            (arguments.work / "bench.json").write_text(json.dumps(whole, indent=1) + "\n")
            print(f"{report(whole)}\n", flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
