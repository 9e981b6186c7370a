"""Before/after checklist: recommended steps of a training, and whether this run did them.

Does: answer each question from the run's records, with the evidence.
Does not: check anything itself; a step without a record counts as not done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_ft.report.tables import Cell, Row, Table, table
from mlx_ft.text import quantities as q
from mlx_ft.text.quantities import written
from mlx_ft.text.safe import one_line

PASSED, FAILED, WARNED, NOT_DONE = "pass", "fail", "look", "not done"
TONES = {PASSED: "ok", FAILED: "fail", WARNED: "warn", NOT_DONE: "warn"}
LEVELS = {"ok": PASSED, "warn": WARNED, "fail": FAILED}
LEAST_BITS = 5
DONE_WELL = 0.5  # mean score of the base model from which there is something to forget
# Questions that one check before training answers.
BEFORE = (
    ("The data support the adapter's size", "capacity"),
    ("Tokens that must be one token are one", "single_tokens"),
    ("Training rows hold nothing that looks wrong, no call that does not exist", "lint"),
    ("Rows train a stop token", "stop_token"),
    ("Thinking mode of rows and prompts agree", "thinking"),
    ("The values were tuned for this family of models", "family"),
    ("No evaluation prompt is in the training rows", "contamination"),
    ("The base model is sound", "base_health"),
)

Answer = tuple[str, str]


def checklist_table(document: Mapping[str, Any]) -> Table:
    """Return each question with pass, look, fail or not done, and the evidence."""
    findings = {
        str(finding.get("check")): finding
        for finding in (document["preflight"] or {}).get("findings") or []
    }
    before = [(words, _finding(findings.get(check))) for words, check in BEFORE]
    before.append(("The base model's own scores are known", _baseline(document)))
    after = [
        ("Outputs were looked at before anything was merged", _look(document)),
        (
            "Fused to 16 bits, re-quantized, each step compared with the one before",
            _export(document),
        ),
        (f"The final model has {LEAST_BITS} bits or more", _bits(document)),
        ("The final model was evaluated, through the chat template alone", _evaluated(document)),
        ("What the base model does well was not forgotten", _forgetting(document)),
    ]
    rows: list[Row] = [
        [words, when, Cell(result, tone=TONES[result]), one_line(evidence, 200)]
        for when, questions in (("before", before), ("after", after))
        for words, (result, evidence) in questions
    ]
    caption = "Checklist: before and after training"
    return table(caption, ("question", "training", "result", "evidence"), rows)


def _finding(finding: Mapping[str, Any] | None) -> Answer:
    if finding is None:
        return NOT_DONE, ""
    return LEVELS.get(str(finding.get("level")), NOT_DONE), written(finding.get("measured"))


def _means(document: Mapping[str, Any], column: str) -> str:
    return ", ".join(
        f"{suite} {q.score(columns[column].get('mean'))}"
        for suite, columns in (document["eval"] or {}).items()
        if column in columns
    )


def _baseline(document: Mapping[str, Any]) -> Answer:
    means = _means(document, "base")
    return (PASSED, means) if means else (NOT_DONE, "no suite was asked of the base model")


def _look(document: Mapping[str, Any]) -> Answer:
    samples = (document["train"] or {}).get("samples") or []
    if not samples:
        return NOT_DONE, ""
    bad = sum(bool(sample.get("degenerate")) for sample in samples)
    evidence = f"{bad} of {q.plural(len(samples), 'answer')} degenerate"
    # Two stop a run; one is for a person to look at.
    return (PASSED if bad == 0 else WARNED if bad == 1 else FAILED), evidence


def _export(document: Mapping[str, Any]) -> Answer:
    checks = (document["export"] or {}).get("checks") or []
    if not checks:
        return NOT_DONE, ""
    passed = sum(bool(check.get("ok")) for check in checks)
    evidence = f"{passed} of {q.plural(len(checks), 'check')} passed"
    return (PASSED if passed == len(checks) else FAILED), evidence


def _bits(document: Mapping[str, Any]) -> Answer:
    bits = ((document["export"] or {}).get("quantized") or {}).get("bits")
    if not q.is_number(bits):
        return NOT_DONE, ""
    return (PASSED if bits >= LEAST_BITS else WARNED), f"{bits} bits"


def _evaluated(document: Mapping[str, Any]) -> Answer:
    means = _means(document, "quantized")
    return (PASSED, means) if means else (NOT_DONE, "no suite was asked of the final model")


def _forgetting(document: Mapping[str, Any]) -> Answer:
    """Compare the final model with the base where the base does well."""
    kept, fell = [], False
    for suite, columns in (document["eval"] or {}).items():
        base, final = columns.get("base") or {}, columns.get("quantized") or {}
        if not q.is_number(final.get("mean")) or (base.get("mean") or 0.0) <= DONE_WELL:
            continue
        kept.append(f"{suite} {q.score(base['mean'])} to {q.score(final['mean'])}")
        fell = fell or (final.get("high") or 1.0) < (base.get("low") or 0.0)
    if not kept:
        return NOT_DONE, "no suite that the base model answers well was asked of both"
    return (FAILED if fell else PASSED), ", ".join(kept)
