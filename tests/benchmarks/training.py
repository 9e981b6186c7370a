"""One LoRA training by mlx_lm.lora and by mlx-ft, in turn, each in a process of its own.

Same float32 weights, rows, settings, number of mini-batches and BLAS, so that only the engine
differs. Says the ratios of wall time (whole process, start-up included), peak resident memory,
padded tokens and final loss on held-out rows, which one common evaluator measures for both
adapters. From its second run on, mlx-ft finds the frozen layers' outputs on the disk. With seeds
that differ, mlx-ft then trains them all in one run that finds nothing, to be set beside the sum of
mlx_lm.lora's.

Usage: python -m tests.benchmarks.training [--layers 12] [--repeats 3] [--seeds 0] [--out FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import yaml

import mlx_ft  # noqa: F401  # first: it loads OpenBLAS before mlx is imported
from mlx_ft.train.batches import total_iterations
from tests.benchmarks.docstrings import write_rows

MODEL, LAYERS = "smollm2-135m-instruct", 30
# With 2e-4 both overfit in the second epoch, and their losses say more of the seed than of them.
RANK, SCALE, LEARNING_RATE, BATCH_SIZE = 8, 8.0, 1e-4, 4
MAX_SEQ_LENGTH = 1024
VALIDATIONS = 4
# Measured afterwards by the common evaluator: more than are validated, for less noise.
HELD_OUT_ROWS = 96
# mlx_ft preloads OpenBLAS before mlx is imported, so that both have the same.
THEIRS = "import mlx_ft; from mlx_lm.lora import main; main()"


@dataclass(frozen=True)
class Run:
    """One training: seconds of the whole process, its peak resident bytes, and its adapter."""

    engine: str
    seed: int
    seconds: float
    peak_resident_bytes: int
    adapter: str
    held_out_loss: float = float("nan")


def timed(command: list[str], log: Path) -> tuple[float, int]:
    """Run a command; return its seconds and its peak resident memory in bytes."""
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"{' '.join(command[:4])} failed; see {log}")
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_maxrss * unit


def write_float32_model(folder: Path) -> None:
    """Write the built-in model with its weights expanded to float32, value for value."""
    from mlx_ft.engine.load import hold_for_cpu, load_weights
    from mlx_ft.export.model_folder import write_model_folder
    from mlx_ft.model.resolve import resolve_model
    from mlx_ft.system.console import Console

    base = resolve_model(MODEL, None, Console()).path
    model, config, _ = load_weights(base)
    model = hold_for_cpu(model)
    plain = {k: v for k, v in config.items() if not k.startswith("quantization")}
    write_model_folder(folder, base, model, {**plain, "torch_dtype": "float32"}, "benchmark\n")


def validation_interval(iters: int) -> int:
    """Return the steps between validations, of which there is one before the first step."""
    return -(-iters // (VALIDATIONS - 1))


def theirs(work: Path, arguments: argparse.Namespace, seed: int, name: str) -> Run:
    iters = total_iterations(arguments.rows, BATCH_SIZE, arguments.epochs, None)
    adapter = work / name
    config = {
        "model": str(work / "model"),
        "train": True,
        "data": str(work / "data"),
        "mask_prompt": True,
        "seed": seed,
        "num_layers": arguments.layers,
        "batch_size": BATCH_SIZE,
        "iters": iters,
        "val_batches": -1,
        "learning_rate": LEARNING_RATE,
        "steps_per_report": 10,
        "steps_per_eval": validation_interval(iters),
        "save_every": 10**6,
        "max_seq_length": MAX_SEQ_LENGTH,
        "adapter_path": str(adapter),
        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0},
    }
    file = work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-c", THEIRS, "--config", str(file)]
    seconds, peak = timed(command, work / f"{name}.log")
    return Run("mlx_lm.lora", seed, seconds, peak, str(adapter))


def ours(work: Path, arguments: argparse.Namespace, seed: int, name: str) -> Run:
    seconds, peak, train = time_ours(work, arguments, (seed,), name)
    return Run("mlx-ft", seed, seconds, peak, str(train / "adapter"))


def seeds_in_one_run(work: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Return seconds and peak resident bytes of one mlx-ft run that trains every seed."""
    fresh_home(work)
    seeds = tuple(range(arguments.repeats))
    seconds, peak, _ = time_ours(work, arguments, seeds, f"{time.strftime('%m%d-%H%M%S')}-seeds")
    print(
        f"mlx-ft, {len(seeds)} seeds in one run: {seconds:.0f} s, {peak / 1e9:.2f} GB", flush=True
    )
    return {"seconds": seconds, "peak_resident_bytes": peak}


def fresh_home(work: Path) -> None:
    """Give what comes next an empty cache."""
    os.environ["MLX_FT_HOME"] = tempfile.mkdtemp(prefix="home-", dir=work)


def time_ours(
    work: Path, arguments: argparse.Namespace, seeds: tuple[int, ...], name: str
) -> tuple[float, int, Path]:
    """Train the seeds in one run; return its seconds, peak resident bytes and stage folder."""
    iters = total_iterations(arguments.rows, BATCH_SIZE, arguments.epochs, None)
    recipe = {
        "name": name,
        "model": str(work / "model"),
        "data": {"path": str(work / "data"), "max_seq_length": MAX_SEQ_LENGTH},
        "train": {
            "num_layers": arguments.layers,
            "lora_parameters": {"rank": RANK, "scale": SCALE},
            "batch_size": BATCH_SIZE,
            "epochs": arguments.epochs,
            "learning_rate": LEARNING_RATE,
            "steps_per_eval": validation_interval(iters),
            "save_every": 10**6,
            **({"seed": seeds[0]} if len(seeds) == 1 else {"seeds": list(seeds)}),
        },
    }
    file = work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    runs = work / f"{name}-runs"
    command = [sys.executable, "-m", "mlx_ft", "train", str(file), "--runs", str(runs)]
    seconds, peak = timed(command, work / f"{name}.log")
    (adapter,) = runs.glob("*/train/adapter")
    return seconds, peak, adapter.parent


def evaluate(work: Path, adapters: list[str]) -> list[float]:
    """Return the exact loss of each adapter on rows that neither engine saw, in nats a trained
    token."""
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_ft.engine.load import load_model, release, scalar
    from mlx_ft.model.chat import ChatFormat

    losses = []
    for adapter in adapters:
        loaded = load_model(work / "model", ChatFormat(), adapter=Path(adapter))
        total, tokens = 0.0, 0
        for line in (work / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines():
            row = loaded.renderer.training_row(json.loads(line)["messages"], mask_prompt=True)
            ids, trained = mx.array([row.ids]), mx.array(row.trained[1:])
            each = nn.losses.cross_entropy(loaded.model(ids[:, :-1])[0], ids[0, 1:])
            total += float((each * trained).sum().item())
            tokens += int(scalar(trained.sum()))
        losses.append(total / tokens)
        del loaded
        release()
    return losses


def padded_tokens(work: Path) -> dict[str, int]:
    """Return the tokens of one epoch: real ones, and with mlx_lm.lora's padding."""
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import iterate_batches

    from mlx_ft.model.chat import ChatFormat, ChatRenderer

    chat = ChatRenderer.from_folder(work / "model", ChatFormat())
    lines = (work / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [chat.training_row(json.loads(line)["messages"], mask_prompt=True).ids for line in lines]

    class Rows:  # what mlx_lm.lora hands to its loop, rendered already
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"row": index}

        def process(self, row: dict[str, Any]) -> tuple[list[int], int]:
            return list(rows[row["row"]]), 0

    batches = iterate_batches(CacheDataset(Rows()), BATCH_SIZE, MAX_SEQ_LENGTH, seed=0)
    lengths = [len(row) - 1 for row in rows]
    return {
        "real": sum(lengths),
        "mlx_lm.lora": sum(int(batch.size) - batch.shape[0] for batch, _ in batches),
    }


def matmul_gflops() -> float:
    """Return the best rate of a float32 product of 512 x 1536 and 1536 x 1536."""
    import mlx.core as mx

    a, b = mx.random.normal((512, 1536)), mx.random.normal((1536, 1536))
    mx.eval(a, b)
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - started)
    return 2 * 512 * 1536 * 1536 / best / 1e9


def metrics_of(run: Run) -> list[dict[str, Any]]:
    """Return what a run of mlx-ft reported."""
    lines = (Path(run.adapter).parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def padding_share(run: Run) -> float:
    """Return the largest share of padding that a run of mlx-ft reported."""
    return max(float(m["padding_share"]) for m in metrics_of(run) if m["kind"] == "train")


def step_gflops(work: Path, run: Run, layers: int) -> float:
    """Return the useful rate of mlx-ft's steps in the last epoch, to set beside matmul_gflops.

    Counts the products of the trained layers (forward, and backward to their inputs) and of the
    head at trained tokens; no padding, no attention, no adapter. The median over the reports
    within which nothing was validated.
    """
    folder = Path(run.adapter).parent
    metrics = metrics_of(run)
    validated = {m["iteration"] for m in metrics if m["kind"] == "validation"}
    reports = [m for m in metrics if m["kind"] == "train"]
    paces = [
        report["tokens_per_second"]
        for before, report in pairwise(reports)
        if before["epoch"] == report["epoch"] == reports[-1]["epoch"]
        and not validated & set(range(before["iteration"], report["iteration"]))
    ]
    split = json.loads((folder.parent / "data" / "manifest.json").read_text(encoding="utf-8"))
    rows = split["info"]["splits"]["train"]
    config = json.loads((work / "model" / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    groups = config["num_key_value_heads"] / config["num_attention_heads"]
    weights = layers * (hidden * hidden * (2 + 2 * groups) + 3 * hidden * inner)
    weights += rows["trained_tokens"] / rows["tokens"] * hidden * config["vocab_size"]
    return float(median(paces) * 2 * 2 * weights / 1e9) if paces else float("nan")


def summary(runs: list[Run], repeats: int) -> dict[str, Any]:
    """Return the ratios mlx-ft / mlx_lm.lora of the medians, and of the sum over all runs."""
    engines = {name: [r for r in runs if r.engine == name] for name in ("mlx_lm.lora", "mlx-ft")}
    a, b = engines["mlx_lm.lora"], engines["mlx-ft"]
    return {
        "wall": median(r.seconds for r in b) / median(r.seconds for r in a),
        "wall_of_the_first_pair": b[0].seconds / a[0].seconds,
        "wall_of_all_runs": sum(r.seconds for r in b) / sum(r.seconds for r in a),
        "peak_resident": median(r.peak_resident_bytes for r in b)
        / median(r.peak_resident_bytes for r in a),
        "held_out_loss": {
            name: [round(r.held_out_loss, 4) for r in of] for name, of in engines.items()
        },
        "runs_each": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="top layers trained; -1: all")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--valid-rows", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", default="same", help="same: seed 0 each time; each: 0, 1, 2 ...")
    parser.add_argument("--only", choices=["mlx_lm.lora", "mlx-ft"], help="one engine alone")
    parser.add_argument("--work", type=Path, default=Path("bench"))
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    write_rows(work / "data", arguments.rows, arguments.valid_rows, HELD_OUT_ROWS)
    if not (work / "model").exists():
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from pathlib import Path; from tests.benchmarks.training"
                " import write_float32_model; write_float32_model(Path(sys.argv[1]))",
                str(work / "model"),
            ],
            check=True,
        )
    fresh_home(work)
    gflops, runs = matmul_gflops(), []
    for repeat in range(arguments.repeats):
        seed = repeat if arguments.seeds == "each" else 0
        for engine, name in ((theirs, "mlx_lm.lora"), (ours, "mlx-ft")):
            if arguments.only in (None, name):
                label = f"{time.strftime('%m%d-%H%M%S')}-{name.replace('.', '_')}"
                run = engine(work, arguments, seed, label)
                print(
                    f"{name}, seed {seed}: {run.seconds:.0f} s, "
                    f"{run.peak_resident_bytes / 1e9:.2f} GB",
                    flush=True,
                )
                runs.append(run)
    together = None
    if arguments.seeds == "each" and arguments.only != "mlx_lm.lora":
        together = seeds_in_one_run(work, arguments)
    losses = evaluate(work, [run.adapter for run in runs])
    done = [Run(**{**asdict(r), "held_out_loss": x}) for r, x in zip(runs, losses, strict=True)]
    result = {
        "settings": {k: str(v) for k, v in vars(arguments).items()},
        "matmul_gflops": gflops,
        "step_gflops": [
            round(step_gflops(work, run, LAYERS if arguments.layers < 0 else arguments.layers), 1)
            for run in done
            if run.engine == "mlx-ft"
        ],
        "padding_share": [round(padding_share(r), 4) for r in done if r.engine == "mlx-ft"],
        "tokens_an_epoch": padded_tokens(work),
        "seeds_in_one_run": together,
        "runs": [asdict(run) for run in done],
    }
    if arguments.only is None:
        ratios = result["mlx-ft / mlx_lm.lora"] = summary(done, arguments.repeats)
        if together is not None:
            theirs_all = sum(run.seconds for run in done if run.engine == "mlx_lm.lora")
            ratios["wall_of_seeds_in_one_run"] = together["seconds"] / theirs_all
    (work / "bench.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=2))


if __name__ == "__main__":
    main()
