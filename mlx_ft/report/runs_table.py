"""`mlx-ft runs`: the list of runs as text and JSON. Does not find runs or read their folders."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from mlx_ft.report.terminal import PLAIN
from mlx_ft.text import quantities as q
from mlx_ft.text.safe import clean, one_line

SCHEMA = 1
# States whose words say more than their name.
TELLING = ("running", "dead", "gate_failed", "failed", "unknown")


def runs_json(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the list as one JSON document, in ASCII."""
    document = {"schema": SCHEMA, "runs": list(entries)}
    return json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False)


def runs_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the list as a table, ending with a newline."""
    if not entries:
        return "no such run\n"
    rows = []
    for entry in entries:
        loss = q.loss(entry["validation_loss"]) if entry["validation_loss"] is not None else "-"
        rows.append(
            [
                one_line(entry["run"], 60),
                entry["state"].replace("_", " "),
                q.moment(entry["created"]).removesuffix(" UTC"),
                "-" if entry["seconds"] is None else q.format_seconds(entry["seconds"]),
                loss,
                _scores(entry["scores"]) or "-",
                q.format_bytes(entry["disk_bytes"]),
            ]
        )
    head = ("run", "state", "begun (UTC)", "time", "loss", "scores, first -> last", "disk")
    alignments = ("left", "left", "left", "right", "right", "left", "right")
    text = tabulate(rows, head, tablefmt="simple", disable_numparse=True, colalign=alignments)
    told = [
        f"{one_line(entry['run'], 60)}: {one_line(entry['words'], 160)}"
        for entry in entries
        if entry["state"] in TELLING
    ]
    total = sum(entry["disk_bytes"] for entry in entries)
    told.append(f"{q.plural(len(entries), 'run')}, {q.format_bytes(total)}")
    return clean("\n".join([text, "", *told])).translate(PLAIN) + "\n"


def _scores(scores: Mapping[str, Any]) -> str:
    return ", ".join(f"{one_line(suite, 24)} {_change(each)}" for suite, each in scores.items())


def _change(each: Mapping[str, Any]) -> str:
    """Return the first and the last score, or the only one with the model that it is of."""
    first, last = each["first"], each["last"]
    if first["column"] == last["column"]:
        return f"{q.score(first['mean'])} ({one_line(first['column'], 20)})"
    return f"{q.score(first['mean'])} -> {q.score(last['mean'])}"


def next_line(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the line with the next step for these runs."""
    running = [entry for entry in entries if entry["state"] == "running"]
    if running:
        return f"next     mlx-ft watch {shlex.quote(running[0]['folder'])}"
    if len(entries) > 1:
        named = " ".join(shlex.quote(entry["folder"]) for entry in entries[:3])
        return f"next     mlx-ft compare {named}"
    if entries:
        return f"next     mlx-ft show {shlex.quote(entries[0]['folder'])}"
    return "next     mlx-ft run RECIPE"
