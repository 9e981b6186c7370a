"""The run as one JSON document (`mlx-ft show RUN --json`).

Does: collect the artifacts of a run folder under fixed, documented keys (`SCHEMA_KEYS`).
Does not: compute, apart from adding up times and findings.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_ft.recipe.names import COLUMNS
from mlx_ft.runs.metrics import metrics_place
from mlx_ft.runs.names import RECORDED_STAGES
from mlx_ft.runs.reader import CHANGED, COMPLETE, ArtifactReader
from mlx_ft.text.safe import without_credentials

SCHEMA = 1
# Key -> meaning. `<...>` stands for a name, `[]` for each entry of a list. A key is null, and a
# list empty, when the run has no such artifact (yet).
SCHEMA_KEYS: dict[str, str] = {
    "schema": "Version of this document; 1.",
    "run": "Name of the run: recipe name and 8 hex digits.",
    "status": "`running`, `done`, `failed`, `gate_failed`, `interrupted` or `stopped` (after the "
    "stage that was asked for), as last recorded.",
    "recipe.file": "The recipe's file, as it was named.",
    "recipe.values": "The resolved recipe: every key with its value.",
    "recipe.origins": "Dotted key -> where its value came from: file and line, `--set`, `default` "
    "or `derived`.",
    "model.name": "The model as the recipe names it.",
    "model.path": "The folder that it was loaded from.",
    "model.revision": "The commit (Hub) or a hash of the content (the others).",
    "model.source": "Where it came from: `builtin`, `hub` or `local`.",
    "model.size_bytes": "Size of its weights on disk.",
    "model.model_type": "Architecture, as in the model's config.json.",
    "model.quantization": "The weights' quantization, as in config.json; null: none.",
    "data.splits.<split>": "A split: `rows` (kept), `dropped_overlong`, `tokens`, "
    "`trained_tokens`, `trained_share` (of tokens), `turns`.",
    "data.splits.<split>.length_quantiles": "Row lengths in tokens: `p5`, `p50`, `p95`, `max`.",
    "data.splits.<split>.histogram": "Row lengths: `edges` (tokens) and `counts` (rows).",
    "data.splits.<split>.categories": "Category -> rows.",
    "data.splits.<split>.sources": "Files read: `path` and `sha256`.",
    "data.coverage": "Length in tokens -> share of the rows that fit in it.",
    "data.schema": "Version of the data stage's statistics; 1.",
    "data.max_seq_length": "Longest row in tokens that was allowed.",
    "data.overlap_rows": "Validation rows that are training rows too, token for token.",
    "data.overlap_lines": "The first of them: pairs of line numbers (train, valid).",
    "preflight.counts": "Level -> number of findings.",
    "preflight.findings": "List of `check`, `level` (ok, warn, fail), `measured`, `limit`, `fix`.",
    "train.info": "What the finished stage says: parameters, iterations, updates, epochs, first "
    "and final losses, `peak_memory_bytes`, `seconds`, `compute`, `fast_path`, `adapted_layers`, "
    "`forward` (the forward pass: `name`, `layers`, `frozen_layers`, `packs`, `skips`, the "
    "`relative_difference` that was measured and its `tolerance`, `reason`, and `fallbacks`, "
    "each with its cost), "
    "`chosen_iteration`, `chosen_score` (null: nothing was asked) and `chosen_validation_loss` of "
    "the weights that were taken, `ended_early`.",
    "train.info.seeds": "With several seeds: `chosen`, `trained` (an entry a seed), `spread` of "
    "what chose, and `reached`: how many came up to the gate, with the interval of that share.",
    "train.seed": "Which seed metrics and samples are of while none of several is chosen, else "
    "null: `seed`, whether it is `finished`, how many are `complete` and `of` how many.",
    "train.metrics": "Every report line in order: `kind` (train, validation, selection), "
    "`iteration`, `loss`, `score`, "
    "`learning_rate`, `tokens_per_second`, `peak_memory_bytes` and more. Null: not finite.",
    "train.samples": "Generations right after training: `messages`, `text`, `finish_reason`, "
    "`generated_tokens`, `degenerate` (null or the reason).",
    "export.checks": "What was verified: `check`, `measured`, `limit`, `ok`.",
    "export.fused": "The fused model, or null: `path` in export/, `bytes`.",
    "export.dtype": "16-bit type that the models were made in: float16 or bfloat16.",
    "export.dtype_reason": "Why it is not the recipe's, or null.",
    "export.original": "With export.base: its `path` and, in `from_trained`, how far the models "
    "fused into it and into the trained base are from the trained one: for `fused` and `quantized` "
    "each `largest` (logit difference over the largest logit), `divergence` (nats), `flips` (share "
    "of positions where the most probable token differs). Else null.",
    "export.quantized": "The final model: `path` in export/, `bytes`, `bits`, `group_size`.",
    "export.quantized.method": "How it was quantized: `gptq` or `round`.",
    "export.quantized.half_layers": "How many layers stay in 16 bits: too narrow for the groups.",
    "export.quantized.raised": "Layer -> its bits, where they are not `bits`.",
    "export.gguf": "The GGUF file, or null: `path` in export/, `bytes`, `kind` (f16, q8_0, q4_0).",
    "export.peak_memory_bytes": "Peak memory of the stage.",
    "survival": "What training changed and storing kept: export/survival.json; null: not measured. "
    "Also of an export that a gate stopped.",
    "survival.schema": "Version of that file; 1.",
    "survival.bits": "Bits of the final model; `raised`, `group_size`, `method`, `dtype` with it.",
    "survival.min_survival": "The limit of the recipe, or null.",
    "survival.survival": "Share of what training changed that the final model keeps: 1 - "
    "KL(adapter, final) / KL(adapter, base) over `positions.held_out`; null: nothing was learned.",
    "survival.positions": "Positions compared: `held_out` (trained tokens of held-out rows) and "
    "`prompts` (the suites').",
    "survival.model.learned_nats": "KL divergence from the base to the adapter on held-out rows.",
    "survival.model.ways.<way>": "`survival`, `nats` and `flips` (share of positions with another "
    "most probable token) against the adapter on held-out rows, `prompt_nats` and `prompt_flips` "
    "on prompts. Ways: fused, quantized (the final model), round-4 to round-8 (each weight by "
    "itself, never written).",
    "survival.layers": "Each adapted layer: `name`, `bits`, `delta_over_weight` (norms).",
    "survival.layers[].kept.<way>": "`gain` (share of the delta in the weights), `noise` (what is "
    "there besides, in sizes of the delta), `output_gain` and `output_noise` of what the layer "
    "gives out, and its `survival`: 1 - (1 - gain)^2 - noise^2 of outputs, of weights in experts.",
    "survival.seconds": "Time the audit took.",
    "eval.<suite>.<column>.mean": "Mean score, 0 to 1. Columns: base, adapter, fused, quantized.",
    "eval.<suite>.<column>.n": "Number of samples.",
    "eval.<suite>.<column>.passed": "Number of samples with the full score.",
    "eval.<suite>.<column>.low": "Lower end of the mean's 95 % interval.",
    "eval.<suite>.<column>.high": "Upper end of the mean's 95 % interval.",
    "eval.<suite>.<column>.by_category": "Category -> `mean`, `n`, `low`, `high`.",
    "eval.<suite>.<column>.failures": "Kind of wrong output -> number of samples.",
    "eval.<suite>.<column>.degenerate": "Sign (empty, loop, cut, leaked_token, open_thinking, "
    "wrong_language, and `any` of empty, loop, leaked_token and open_thinking) -> `count`, `rate` "
    "and its 95 % interval `low`, `high`.",
    "eval.<suite>.<column>.against.<other>": "The column less another one (base, adapter) on the "
    "same prompts: `difference` with its 95 % interval `low`, `high`; `n`, `clusters`, `wins`, "
    "`losses`; `p` of `test` (mcnemar, sign_flip), `p_holm` (corrected over the suites); `verdict` "
    "(better, worse, cannot tell); `more_prompts` that would about tell, or null.",
    "gates": "List of what was judged: `gate`, `suite`, `column`, `metric`, `limit`, `asked_by` "
    "(recipe, or a suite's margin), `measured` with `low` and `high` of its 95 % interval or null, "
    "`n`, `passed`, `settled` (the interval is on one side of the limit), `failed` (ids of "
    "samples).",
    "warnings": "List of what makes the columns less comparable than they look: a chat format that "
    "is not the training's and was allowed, one that could not be compared, and the like; and of "
    "parts of the fast way that the training did not take.",
    "columns.<column>.template": "Whose chat format it was asked in: `same` (the training's), "
    "`own` (no training is known), `mismatch` (not the training's, which was allowed), `unknown` "
    "(a server's).",
    "columns.<column>.<fact>": "What else is known of it: `model`, `source`, `revision`, `run`, "
    "`column` or `server`.",
    "timings.created": "Start of the run, seconds since 1970.",
    "timings.updated": "Last change of run.json, seconds since 1970.",
    "timings.exit_reason": "Why the run ended.",
    "timings.total_seconds": "Sum of the stages' recorded seconds; making the report is no stage.",
    "timings.stages.<stage>.state": "`complete`, `changed` (a file differs from the manifest), "
    "`unfinished` or null.",
    "timings.stages.<stage>.seconds": "Time the stage took.",
    "timings.stages.<stage>.peak_memory_bytes": "Peak memory of the stage.",
    "timings.stages.<stage>.reused": "Whether an earlier result was taken over.",
    "environment": "Versions (`mlx_ft`, `mlx`, `mlx_lm`, `python` and more), machine (`platform`, "
    "`machine`, `cores`, `memory_bytes`, `blas`, `device`), source (`commit`, `dirty`).",
}


def run_document(run: Path) -> dict[str, Any]:
    """Return the result of a run, as JSON values under the keys of SCHEMA_KEYS.

    Works for unfinished and failed runs: missing artifacts are null. Raises RunError if `run` is no
    run folder, and for broken artifacts, naming every unreadable file.
    """
    reader = ArtifactReader(run)
    document = read_document(reader)
    reader.raise_faults()
    return document


def read_document(reader: ArtifactReader) -> dict[str, Any]:
    """Return the document of `run_document`. Faults stay with the reader."""
    record = reader.json("run.json") or {}
    results, recipe = _results(reader), _recipe(reader)
    document = {
        "schema": SCHEMA,
        "run": record.get("run", reader.run.name),
        "status": record.get("status"),
        "recipe": recipe,
        "model": _object(record.get("model")),
        "data": _data(reader),
        "preflight": _preflight(reader),
        "train": _train(reader, recipe),
        "export": reader.manifest_info("export"),
        "survival": _survival(reader),
        "eval": _eval(reader, results),
        "gates": _gates(reader, results),
        "warnings": [*_warnings(reader, results), *_fallbacks(reader)],
        "columns": _columns(reader, results),
        "timings": _timings(reader, record),
        "environment": _object(record.get("environment")),
    }
    redacted: dict[str, Any] = without_credentials(document)
    return redacted


def document_json(document: dict[str, Any]) -> str:
    """Return the document as ASCII JSON text, which is safe to print in any terminal."""
    return json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False)


def _object(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _recipe(reader: ArtifactReader) -> dict[str, Any] | None:
    stored = reader.json("recipe.json")
    if stored is None:
        return None
    return {
        "file": stored.get("file"),
        "values": _object(stored.get("recipe")) or {},
        "origins": _object(stored.get("origins")) or {},
    }


def _data(reader: ArtifactReader) -> dict[str, Any] | None:
    if reader.state("data") not in (COMPLETE, CHANGED):
        return None
    return reader.json("data/stats.json")


def _preflight(reader: ArtifactReader) -> dict[str, Any] | None:
    stored = reader.json("preflight.json")
    if stored is None:
        return None
    findings = [entry for entry in stored.get("findings") or [] if isinstance(entry, dict)]
    levels = Counter(str(entry.get("level")) for entry in findings)
    return {"counts": dict(sorted(levels.items())), "findings": findings}


def _train(reader: ArtifactReader, recipe: dict[str, Any] | None) -> dict[str, Any] | None:
    place = metrics_place(reader.run)
    if place is None:
        return None
    seed = None
    if place.seed is not None:
        asked = (_object((recipe or {}).get("values", {}).get("train")) or {}).get("seeds") or []
        counted = {"complete": place.complete, "of": max(len(asked), place.complete)}
        seed = {"seed": place.seed, "finished": place.finished, **counted}
    return {
        "info": reader.manifest_info("train"),
        "seed": seed,
        "metrics": reader.json_lines(f"{place.folder}/metrics.jsonl"),
        "samples": reader.json_lines(f"{place.folder}/samples.jsonl"),
    }


def _survival(reader: ArtifactReader) -> dict[str, Any] | None:
    folder = reader.folder("export")
    return reader.json(f"{folder}/survival.json") if folder else None


def _results(reader: ArtifactReader) -> dict[str, Any] | None:
    folder = reader.folder("eval")
    return reader.json(f"{folder}/results.json") if folder else None


def _broken_results(reader: ArtifactReader, found: str) -> None:
    reader.broken(f"{reader.folder('eval')}/results.json", found)


def _eval(reader: ArtifactReader, results: dict[str, Any] | None) -> dict[str, Any] | None:
    if results is None:
        return None
    suites = _object(results.get("suites")) or {}
    for suite, columns in suites.items():
        if not isinstance(columns, dict) or not all(isinstance(c, dict) for c in columns.values()):
            _broken_results(reader, f"suites.{suite} is not a table of columns")
    return suites


def _warnings(reader: ArtifactReader, results: dict[str, Any] | None) -> list[str]:
    told = (results or {}).get("warnings") or []
    if not isinstance(told, list) or not all(isinstance(each, str) for each in told):
        _broken_results(reader, "warnings is not a list of sentences")
        return []
    return told


def _fallbacks(reader: ArtifactReader) -> list[str]:
    """Return the parts of the fast way that the training did not take, each with its cost."""
    info = _object(reader.manifest_info("train")) or {}
    told = (_object(info.get("forward")) or {}).get("fallbacks") or []
    return [each for each in told if isinstance(each, str)] if isinstance(told, list) else []


def _columns(reader: ArtifactReader, results: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    columns = (results or {}).get("columns") or {}
    if not isinstance(columns, dict) or not all(isinstance(c, dict) for c in columns.values()):
        _broken_results(reader, "columns is not a table of columns")
        return {}
    return columns


def _gates(reader: ArtifactReader, results: dict[str, Any] | None) -> list[dict[str, Any]]:
    judged = (results or {}).get("gates") or []
    keys = ("suite", "column", "metric", "limit", "asked_by", "measured", "n", "passed", "settled")
    if not isinstance(judged, list) or not all(
        isinstance(each, dict) and all(key in each for key in (*keys, "low", "high", "failed"))
        for each in judged
    ):
        _broken_results(reader, "gates is not a list of judgements")
        return []
    return judged


def _timings(reader: ArtifactReader, record: dict[str, Any]) -> dict[str, Any]:
    recorded = _object(record.get("stages")) or {}
    stages = {}
    for stage in dict.fromkeys((*RECORDED_STAGES, *recorded)):
        if stage == "report":
            continue  # recorded after the report was written, which would differ the next time
        entry = _object(recorded.get(stage)) or {}
        keys = ("seconds", "peak_memory_bytes", "reused")
        stages[stage] = {
            "state": reader.state(stage),
            **{key: entry.get(key) for key in keys},
        }
    seconds = [e["seconds"] for e in stages.values() if isinstance(e["seconds"], (int, float))]
    return {
        "created": record.get("created"),
        "updated": record.get("updated"),
        "exit_reason": record.get("exit_reason"),
        "total_seconds": sum(seconds) if seconds else None,
        "stages": stages,
    }


def ordered_columns(columns: Mapping[str, Any]) -> list[str]:
    """Return the names of measured columns, the known ones first and in their order."""
    known = [name for name in COLUMNS if name in columns]
    return known + sorted(set(columns) - set(known))


def is_report(line: Mapping[str, Any]) -> bool:
    """Tell whether a line of the metrics reports training (and not validation)."""
    return line.get("kind") == "train"
