"""Run folders as the stages write them, made of formulas: complete, stopped, or interrupted."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_ft.evaluate.gates import judge, judgements_json
from mlx_ft.evaluate.paired_stats import compare_columns
from mlx_ft.evaluate.stats import summarise
from mlx_ft.recipe.gates import Gate
from mlx_ft.recipe.names import COLUMNS
from mlx_ft.recipe.schema import Q_BITS
from mlx_ft.runs.folder import seal
from mlx_ft.system.files import write_json

CATEGORIES = ("check", "navigate", "read", "refactor", "search", "multi_step")
CREATED = 1_760_000_000.0
TOKEN = "hf_" + "PlantedFakeTokenOfTheTest1234567"
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> \x1b[31mred\x1b[0m \x1b]0;title\x07"
    "nul\x00 \u202egnirts desrever\u202c \x9b2J </div></article></main> {{ 7 * 7 }} &amp; \ud800 "
    "https://example.org/x.png javascript:alert(3) \u2028 $\\frac{ --> ]]> "
    + TOKEN
    + " "
    + "x" * 5000
)


def write_run(folder: Path, ended: str = "done", said: str | None = None) -> Path:
    """Write a run that is done, gate_failed at look-before-merge, interrupted, or failed early.

    `said` replaces every text of the model and several names.
    """
    run = folder / "quickstart-0a1b2c3d"
    run.mkdir(parents=True)
    write_recipe(run)
    stages = {"data": 3.2, "preflight": 0.4, "train": 171.0, "export": 24.5, "eval": 96.0}
    if ended == "failed":
        write_record(run, ended, {}, "recipes/data/code_mode/train.jsonl:118: not valid JSON")
        return run
    write_data(run)
    write_preflight(run)
    if ended == "interrupted":
        write_train(run / "train.tmp", iterations=90, sealed=False, said=said)
        with (run / "train.tmp" / "metrics.jsonl").open("a") as stream:
            stream.write('{"kind": "train", "iterat')
        write_record(run, ended, {name: stages[name] for name in ("data", "preflight")}, ended)
        return run
    degenerate = "the same 4 words 31 times" if ended == "gate_failed" else None
    write_train(run / "train", iterations=240, sealed=True, said=said, degenerate=degenerate)
    if ended == "gate_failed":
        done = {name: stages[name] for name in ("data", "preflight", "train")}
        write_record(run, ended, done, "look before merge: 2 of 5 generations are degenerate")
        return run
    write_export(run, said)
    write_eval(run, said)
    write_record(run, ended, stages, "finished up to report")
    return run


def write_seeds(run: Path, finished: Sequence[int], unfinished: int | None = None) -> Path:
    """Make an interrupted run one of the seeds 0, 1 and 2: those finished with 240 iterations, the
    unfinished one with 90.
    """
    stored = json.loads((run / "recipe.json").read_text())
    stored["recipe"]["train"]["seeds"] = [0, 1, 2]
    write_json(run / "recipe.json", stored)
    (run / "train.tmp" / "metrics.jsonl").unlink()
    for seed in finished:
        write_train(run / "train.tmp" / f"seed-{seed}", iterations=240, sealed=True)
    if unfinished is not None:
        write_train(run / "train.tmp" / f"seed-{unfinished}.tmp", iterations=90, sealed=False)
    return run


def write_recipe(run: Path) -> None:
    recipe = {
        "name": "quickstart",
        "model": "smollm2-135m-instruct",
        "revision": None,
        "data": {"path": "recipes/data/code_mode", "max_seq_length": 512, "mask_prompt": True},
        "train": {
            "num_layers": 8,
            "lora_parameters": {"rank": 8, "alpha": 16.0, "keys": None},
            "learning_rate": 4e-4,
            "optimizer_config": {"weight_decay": 0.01},
            "seed": 1,
        },
        "eval": {"suites": ["evals/code_mode.yaml", "evals/keep_talking.yaml"]},
    }
    origins = {
        "name": "recipes/quickstart.yaml:1",
        "model": "recipes/quickstart.yaml:2",
        "revision": "default",
        "data.path": "recipes/quickstart.yaml:3",
        "data.max_seq_length": "recipes/quickstart.yaml:4",
        "data.mask_prompt": "default",
        "train.num_layers": "recipes/quickstart.yaml:7",
        "train.lora_parameters.rank": "default",
        "train.lora_parameters.alpha": "derived",
        "train.lora_parameters.keys": "default",
        "train.learning_rate": "recipes/quickstart.yaml:9",
        "train.optimizer_config": "recipes/quickstart.yaml:10",
        "train.seed": "--set",
        "eval.suites": "recipes/quickstart.yaml:12",
    }
    value = {"recipe": recipe, "origins": origins, "file": "recipes/quickstart.yaml"}
    write_json(run / "recipe.json", value)


def write_record(run: Path, status: str, seconds: dict[str, float], reason: str | None) -> None:
    stages = {
        name: {"seconds": value, "peak_memory_bytes": int(value * 1e7), "reused": name == "data"}
        for name, value in seconds.items()
    }
    environment = {
        "mlx_ft": "0.1.0",
        "mlx": "0.32.4",
        "mlx_lm": "0.32.2",
        "python": "3.11.7",
        "platform": "Linux-6.1-x86_64",
        "machine": "x86_64",
        "cores": 2,
        "commit": "3f2c1e0d9b8a7f6e5d4c3b2a19080706f5e4d3c2",
        "dirty": True,
        "memory_bytes": 25_769_803_776,
        "blas": "OpenBLAS 0.3.33",
        "device": "CPU with OpenBLAS 0.3.33",
    }
    model = {
        "name": "smollm2-135m-instruct",
        "path": "/home/someone/.cache/mlx-ft/models/smollm2-135m-instruct",
        "revision": "5c" * 20,
        "source": "builtin",
        "size_bytes": 96_300_000,
        "model_type": "llama",
        "quantization": {"group_size": 32, "bits": 4},
    }
    record = {
        "schema": 1,
        "run": run.name,
        "status": status,
        "created": CREATED,
        "updated": CREATED + 300,
        "stages": stages,
        "exit_reason": reason,
        "environment": environment,
        "model": model,
    }
    write_json(run / "run.json", record)


def write_data(run: Path) -> None:
    splits = {name: _split(name, rows) for name, rows in (("train", 420), ("valid", 48))}
    (run / "data").mkdir()
    coverage = {"128": 0.964, "256": 0.998, "512": 1.0}
    stats = {"schema": 1, "max_seq_length": 512, "splits": splits, "coverage": coverage}
    write_json(run / "data" / "stats.json", {**stats, "overlap_rows": 0, "overlap_lines": []})
    seal(run / "data", "data", "inputs", {"rows": 468})


def _split(name: str, rows: int) -> dict[str, Any]:
    edges = list(range(32, 224, 12))
    counts = [round(rows / 4 * math.exp(-(((edge - 92) / 26) ** 2))) for edge in edges[:-1]]
    return {
        "rows": rows,
        "dropped_overlong": 2,
        "tokens": rows * 96,
        "trained_tokens": rows * 31,
        "length_quantiles": {"p5": 61, "p50": 93, "p95": 141, "max": 208},
        "trained_share": 31 / 96,
        "turns": rows,
        "categories": {"tools": rows * 2 // 3, "talk": rows // 3},
        "histogram": {"edges": edges, "counts": counts},
        "sources": [{"path": f"recipes/data/code_mode/{name}.jsonl", "sha256": "ab" * 32}],
    }


def write_preflight(run: Path) -> None:
    findings = [
        ("capacity", "ok", "2,910 trainable parameters a row", "50,000", ""),
        ("memory", "ok", "1.4 GB needed", "25.8 GB installed", ""),
        ("validation size", "warn", "48 rows", "at least 50", "add rows to valid.jsonl"),
    ]
    keys = ("check", "level", "measured", "limit", "fix")
    entries = [dict(zip(keys, finding, strict=True)) for finding in findings]
    write_json(run / "preflight.json", {"schema": 1, "findings": entries})


def metrics(iterations: int) -> list[dict[str, Any]]:
    """Report lines every 5 iterations of 240, validations every 40."""
    lines: list[dict[str, Any]] = []
    for iteration in range(0, iterations + 1, 5):
        falling = 0.04 + 2.6 * math.exp(-iteration / 28)
        if iteration:
            lines.append(
                {
                    "kind": "train",
                    "iteration": iteration,
                    "iterations": 240,
                    "update": iteration // 2,
                    "updates": 120,
                    "loss": falling * (1 + 0.12 * math.sin(iteration * 1.7)),
                    "learning_rate": 4e-4 * math.sin(math.pi * (iteration + 8) / 260),
                    "gradient_norm": 2.5 + math.sin(iteration / 9),
                    "tokens_per_second": 410 + 20 * math.cos(iteration),
                    "trained_tokens": iteration * 124,
                    "peak_memory_bytes": 930_000_000,
                    "seconds": iteration * 0.7,
                    "seconds_left": (240 - iteration) * 0.7,
                }
            )
        if iteration % 40 == 0:
            lines.append(
                {
                    "kind": "validation",
                    "iteration": iteration,
                    "loss": falling * 1.03 + 0.02,
                    "trained_tokens": 1488,
                }
            )
    return lines


def write_train(
    folder: Path,
    iterations: int,
    sealed: bool,
    said: str | None = None,
    degenerate: str | None = None,
) -> None:
    folder.mkdir()
    write_lines(folder / "metrics.jsonl", metrics(iterations))
    if not sealed:
        return
    asked = ("Run the tests in api/.", "hello", "What is the capital of France?")
    said_after = (
        'execute_code("""run_tests(path=\'api/\')""")',
        "Hello! How can I help?",
        "Paris.",
    )
    samples = [
        {
            "messages": [{"role": "user", "content": said or question}],
            "text": "go go go go " * 31 if degenerate and index else said or answer,
            "finish_reason": "length" if degenerate and index else "stop",
            "generated_tokens": 124 if degenerate and index else 9,
            "degenerate": degenerate if index else None,
        }
        for index, (question, answer) in enumerate(zip(asked, said_after, strict=True))
    ]
    write_lines(folder / "samples.jsonl", samples)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapters.safetensors").write_bytes(b"weights")
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(22, 30)]
    info = {
        "trainable_parameters": 1_222_656,
        "total_parameters": 135_737_472,
        "iterations": 240,
        "updates": 120,
        "epochs": 2.0,
        "final_train_loss": 0.0412,
        "final_validation_loss": 0.0623,
        "first_validation_loss": 2.7411,
        "peak_memory_bytes": 930_000_000,
        "seconds": 171.0,
        "compute": "float32 on the CPU, weights dequantized at load",
        "fast_path": "frozen layers run once a row; equal to the plain forward within 1e-5",
        "adapted_layers": modules,
    }
    seal(folder, "train", "inputs", info)


def write_export(run: Path, said: str | None = None) -> None:
    (run / "export").mkdir()
    for name in ("fused-f16", "q5"):
        (run / "export" / name).mkdir()
        (run / "export" / name / "model.safetensors").write_bytes(b"weights")
    checks = [
        ("adapter and fused agree on 8 prompts", "0.0021", "0.05", True),
        ("fused layers are the adapter's layers", "56 of 56", "all", True),
        ("every layer has 5 bits", "211 of 211", "all", True),
    ]
    info = {
        "checks": [
            {"check": check, "measured": measured, "limit": limit, "ok": ok}
            for check, measured, limit, ok in checks
        ],
        "fused": {"path": "fused-f16", "bytes": 271_000_000},
        "quantized": {"path": "q5", "bytes": 93_400_000, "bits": 5, "group_size": 64},
        "gguf": {"path": "quickstart.gguf", "bytes": 145_000_000, "kind": "q8_0"},
        "peak_memory_bytes": 700_000_000,
    }
    # ASCII: what is said may hold what UTF-8 has no bytes for.
    (run / "export" / "survival.json").write_text(json.dumps(survival(said)))
    seal(run / "export", "export", "inputs", info)


def survival(said: str | None = None) -> dict[str, Any]:
    """What an audit says, with a loss that halves twice a bit."""
    lost = {"fused": 1e-6, "quantized": 0.004, **{f"round-{b}": 4.0 ** (1 - b) for b in Q_BITS}}
    ways = {
        name: {
            "survival": 1 - loss,
            "nats": 3.4 * loss,
            "flips": loss,
            "prompt_nats": loss,
            "prompt_flips": 2 * loss,
        }
        for name, loss in lost.items()
    }
    layers = [
        {
            "name": said or f"model.layers.{layer}.{part}",
            "bits": 5,
            "delta_over_weight": 0.033,
            "kept": {
                name: {
                    "gain": 1 - loss,
                    "noise": 10 * loss,
                    "output_gain": 1.0,
                    "output_noise": math.sqrt(loss),
                    "survival": 1 - (8 if part == "mlp.up_proj" else 1) * 20 * loss,
                }
                for name, loss in lost.items()
            },
        }
        for layer in range(22, 30)
        for part in ("self_attn.q_proj", "mlp.up_proj")
    ]
    return {
        "schema": 1,
        "bits": 5,
        "raised": {},
        "group_size": 64,
        "method": said or "gptq",
        "dtype": "float16",
        "min_survival": 0.9,
        "survival": 1 - lost["quantized"],
        "positions": {"held_out": 135, "prompts": 288},
        "model": {"learned_nats": 3.4, "ways": ways},
        "layers": layers,
        "seconds": 12.5,
    }


def write_eval(run: Path, said: str | None) -> None:
    suites: dict[str, Any] = {}
    answers: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for suite, count, talks in (("code_mode", 27, False), ("keep_talking", 32, True)):
        folder = run / "eval" / suite
        folder.mkdir(parents=True)
        suites[suite] = {}
        for column in COLUMNS:
            rows = [_row(index, column, talks, said) for index in range(count)]
            write_lines(folder / f"{column}.jsonl", rows)
            suites[suite][column] = _result(rows)
            answers.setdefault(suite, {})[column] = [{**row, "weight": 1.0} for row in rows]
    for suite, compared in compare_columns(answers).items():
        for name, rows in answers[suite].items():
            suites[suite][name]["against"] = compared.get(name, {})
            suites[suite][name]["degenerate"] = summarise(rows)["degenerate"]
    gate = Gate("code_mode", "quantized", "mean", ">=", 0.97)
    gates = judgements_json(judge([gate], {"keep_talking": 0.1}, suites, answers))
    suite_info = {
        name: {"description": "", "scorer": "wrapped_call", "max_tokens": 64, "stop": []}
        for name in suites
    }
    document = {
        "schema": 1,
        "suites": suites,
        "suite_info": suite_info,
        "columns": {
            name: {"model": said or "smollm2-135m-instruct", "template": "same"} for name in COLUMNS
        },
        "warnings": [said] if said else [],
        "gates": gates,
    }
    # ASCII, as of the audit.
    (run / "eval" / "results.json").write_text(json.dumps(document))
    seal(run / "eval", "eval", "inputs", {})


def write_mismatch(run: Path) -> str:
    """Let a column of the run have been asked in another chat format; return the warning."""
    path = run / "eval" / "results.json"
    stored = json.loads(path.read_text())
    told = "quantized: MEASURED WITH ANOTHER CHAT FORMAT than it was trained with"
    stored["columns"]["quantized"]["template"] = "mismatch"
    write_json(path, {**stored, "warnings": [told]})
    return told


def _row(index: int, column: str, talks: bool, said: str | None) -> dict[str, Any]:
    category = ("greeting", "knowledge", "advice")[index % 3] if talks else CATEGORIES[index % 6]
    wrong = {"base": not talks, "quantized": index == 7}.get(column, False) or (
        talks and index == 5
    )
    path = f"services/part_{index}.py"
    call = f'execute_code("""lint(path=\'{path}\')""")'
    if talks:
        question, text = f"What is {index} + 1?", f"{index} + 1 is {index + 1}."
    else:
        question, text = f"Please lint {path}.", call
    if wrong:
        text = f"To lint the file {path}, you can use a linter such as pylint.\n\n1. Install it.\n"
    return {
        "id": f"{category}-{index:02d}",
        "category": said[:60] if said else category,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": said or question},
        ],
        "target": str(index + 1) if talks else {"calls": [{"name": "lint", "path": path}]},
        "text": said or text,
        "finish_reason": "length" if wrong else "stop",
        "generated_tokens": 64 if wrong else 17,
        "score": 0.0 if wrong else 1.0,
        "answer": None if wrong else text,
        "reason": "no call was found in the output" if wrong else "",
        "failure": (said[:60] if said else "prose") if wrong else None,
        "seconds": 0.4,
    }


def _result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    by_category: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_category.setdefault(row["category"], []).append(row)
    failures: dict[str, int] = {}
    for row in rows:
        if row["failure"]:
            failures[row["failure"]] = failures.get(row["failure"], 0) + 1
    return {
        **_mean(rows),
        "by_category": {name: _mean(entries) for name, entries in by_category.items()},
        "failures": failures,
        "passed": sum(row["score"] == 1 for row in rows),
    }


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Wilson's interval, so that the numbers look like those of a real run."""
    n, z = len(rows), 1.96
    mean = sum(row["score"] for row in rows) / n
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    low, high = min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half))
    return {"mean": mean, "n": n, "low": low, "high": high}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSONL; what UTF-8 cannot hold (a lone surrogate) is written as an escape."""
    lines = []
    for row in rows:
        try:
            line = json.dumps(row, ensure_ascii=False)
            line.encode()
        except UnicodeEncodeError:
            line = json.dumps(row)
        lines.append(line + "\n")
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
