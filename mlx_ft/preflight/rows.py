"""Checks of the rows, from the data stage's statistics.

Does not: read rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_ft.preflight.findings import Finding, Level, PreflightInput, passes

MIN_COVERAGE = 0.95
MIN_VALIDATION_ROWS = 10
# Category of the base model's own answers, and the share of what was asked for that is enough:
# answers that are too long are left out, as other rows are.
REPLAYED, MIN_REPLAYED = "replay", 0.5
# What configs call the longest context.
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length")


def stop_token(facts: PreflightInput) -> Finding:
    """Rows that never train a stop token teach a model to talk on."""
    check, stats = "stop_token", facts.train_stats
    rows, trained = facts.rows, int(stats["stop_trained_rows"])
    measured = f"{trained:,} of {rows:,} rows train a stop token"
    limit = "all rows"
    if trained == rows:
        return passes(check, measured, limit)
    level: Level = "warn" if trained else "fail"
    return Finding(check, level, measured, limit, "repair the chat template or the eos_token")


def coverage(facts: PreflightInput) -> Finding:
    """How many rows fit into max_seq_length, and into round lengths."""
    check, shares = "coverage", facts.data_stats["coverage"]
    chosen = facts.recipe.data.max_seq_length
    share = float(shares[str(chosen)])
    others = ", ".join(f"{int(n):,}: {x:.1%}" for n, x in shares.items() if int(n) != chosen)
    measured = f"{chosen:,} tokens cover {share:.1%} of the rows ({others})"
    limit = f"{MIN_COVERAGE:.0%} of the rows"
    if share >= MIN_COVERAGE:
        return passes(check, measured, limit)
    longest = facts.train_stats["length_quantiles"]["max"]
    enough = min((int(n) for n, x in shares.items() if x >= MIN_COVERAGE), default=longest)
    fix = f"set data.max_seq_length to {enough}, or shorten the rows"
    return Finding(check, "warn", measured, limit, fix)


def trained_context(config: Mapping[str, Any]) -> int | None:
    """Return how many positions a model was made for, by its config, or None when it does not say.

    Where positions are scaled, that is the original's length times the factor.
    """
    named = [config.get(key) for key in CONTEXT_KEYS]
    lengths = [value for value in named if isinstance(value, int) and value > 0]
    scaling = config.get("rope_scaling")
    if lengths and isinstance(scaling, Mapping):
        original = scaling.get("original_max_position_embeddings", 0)
        factor = scaling.get("factor", 0)
        if isinstance(original, int) and isinstance(factor, int | float):
            lengths.append(int(original * factor))
    return max(lengths, default=None)


def context(facts: PreflightInput) -> Finding:
    """Rows with positions that the model never saw, which it computes noise at."""
    check, there = "context", trained_context(facts.model_config)
    longest = int(facts.train_stats["longest_kept"])
    if there is None:
        return passes(check, "the model's config names no longest context", "none named")
    limit = f"{there:,} tokens, the longest context of the model"
    if not facts.rows_beyond_context:
        return passes(check, f"the longest row has {longest:,} tokens", limit)
    measured = f"{facts.rows_beyond_context:,} of {facts.rows:,} rows are longer, up to {longest:,}"
    fix = f"set data.max_seq_length to {there} or less, or use a model with a longer context"
    return Finding(check, "warn", measured, limit, fix)


def validation(facts: PreflightInput) -> Finding:
    """A validation set that is there, and large enough for its loss to mean something."""
    check, rows = "validation", int(facts.valid_stats["rows"])
    measured, limit = f"{rows:,} validation rows", f"at least {MIN_VALIDATION_ROWS}"
    if rows >= MIN_VALIDATION_ROWS:
        return passes(check, measured, limit)
    level: Level = "warn" if rows else "fail"
    fix = f"hold out more rows into {facts.file_name('valid')}"
    if facts.recipe.data.holdout is not None:
        fix = "raise data.holdout, or add rows"
    return Finding(check, level, measured, limit, fix)


def overlap(facts: PreflightInput) -> Finding:
    """Validation rows that are training rows too measure memory, not learning."""
    check, rows = "overlap", int(facts.data_stats["overlap_rows"])
    measured, limit = f"{rows:,} validation rows are training rows too", "none"
    if not rows:
        return passes(check, measured, limit)
    lines = ", ".join(str(valid) for _, valid in facts.data_stats["overlap_lines"])
    fix = f"remove these lines of {facts.file_name('valid')}: {lines}"
    return Finding(check, "warn", measured, limit, fix)


def contamination(facts: PreflightInput) -> Finding:
    """Prompts of the evaluation that the training rows hold measure memory as well."""
    check, found = "contamination", facts.contaminated
    whole = sum(is_whole for _, _, is_whole in found)
    file = facts.file_name("train")
    measured = f"{len(found):,} prompts of the suites are in {file}, {whole:,} of them whole"
    limit = "none, nor 13 words of one in a row"
    if not found:
        return passes(check, measured, limit)
    named = ", ".join(f"{name} (line {line})" for name, line, _ in found[:5])
    more = ", ..." if len(found) > 5 else ""
    return Finding(check, "warn", measured, limit, f"remove the rows or the prompts: {named}{more}")


def replay(facts: PreflightInput) -> Finding:
    """Answers of the base model that are missing where they were asked for."""
    check, share = "replay", facts.recipe.data.replay
    if share is None:
        return passes(check, "no answers of the base model are asked for", "none asked for")
    found = int(facts.train_stats.get("categories", {}).get(REPLAYED, 0))
    measured = f"{found:,} of {facts.rows:,} rows are answers of the base model"
    limit = f"{share:.0%} of the rows"
    if found >= MIN_REPLAYED * share * facts.rows:
        return passes(check, measured, limit)
    fix = "leave data.replay out: this model has too few answers that end and say something"
    return Finding(check, "warn", measured, limit, fix)


def thinking(facts: PreflightInput) -> Finding:
    """Thinking mode and rows that disagree teach the wrong mode."""
    check, wanted = "thinking", facts.recipe.chat.enable_thinking
    rows = int(facts.train_stats["thinking_rows"])
    measured = f"enable_thinking is {str(wanted).lower()}, {rows:,} of {facts.rows:,} rows think"
    limit = "rows that think with enable_thinking, none without"
    if wanted == bool(rows):
        return passes(check, measured, limit)
    fix = f"set chat.enable_thinking to {str(not wanted).lower()}, or change the rows"
    return Finding(check, "warn", measured, limit, fix)


def lint(facts: PreflightInput) -> Finding:
    """Training rows that are valid and look wrong."""
    check, hits = "lint", facts.data_stats["lint"]
    off = facts.recipe.data.lint_off
    limit = "no rule hit" + "".join(f"; {name} off: {reason}" for name, reason in off.items())
    if not hits:
        return passes(check, f"nothing in {facts.rows:,} rows looks wrong", limit)
    measured = "; ".join(f"{hit['rule']}: {hit['count']:,} {hit['found']}" for hit in hits)
    fix = "; ".join(f"{hit['rule']} (line {_some(hit['lines'])}): {hit['fix']}" for hit in hits)
    level: Level = "fail" if any(hit["severity"] == "fail" for hit in hits) else "warn"
    return Finding(check, level, measured, limit, f"{fix}; or name it in data.lint_off with why")


def _some(lines: Sequence[int]) -> str:
    return ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")


def tools(facts: PreflightInput) -> Finding:
    """Rows with tools and a chat template that leaves them out: the model never sees its tools."""
    check, rows = "tools", int(facts.train_stats["toolless_rows"])
    measured, limit = f"{rows:,} rows have tools that the chat template leaves out", "none"
    if not rows:
        return passes(check, measured, limit)
    fix = "use a model whose chat template knows tools, or describe them in a system message"
    return Finding(check, "warn", measured, limit, fix)
