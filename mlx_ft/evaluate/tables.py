"""Results as tables for a terminal. Does not: read files, print, or compute anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate


def result_tables(results: Mapping[str, Any]) -> str:
    """Return one table a suite of what `evaluate` returned.

    Rows are the categories and the total, each as mean and 95 % interval, then how many samples
    scored 1, then how often each kind of failure came; columns are the models.
    """
    return "\n\n".join(
        _suite_table(name, columns) for name, columns in results["suites"].items() if columns
    )


def _suite_table(name: str, columns: Mapping[str, Mapping[str, Any]]) -> str:
    summaries = list(columns.values())
    categories = list(dict.fromkeys(c for each in summaries for c in each["by_category"]))
    kinds = list(dict.fromkeys(kind for each in summaries for kind in each["failures"]))
    rows = [
        [category, *(_cell(each["by_category"].get(category)) for each in summaries)]
        for category in categories
    ]
    rows.append(["total", *(_cell(each) for each in summaries)])
    rows.append(["passed", *(f"{each['passed']} of {each['n']}" for each in summaries)])
    rows += [[kind, *(str(each["failures"].get(kind, 0)) for each in summaries)] for kind in kinds]
    headers = [f"{name} (n = {summaries[0]['n']})", *columns]
    alignment = ["left"] + ["right"] * len(summaries)
    return tabulate(rows, headers=headers, colalign=alignment, disable_numparse=True)


def _cell(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return "-"
    return f"{summary['mean']:.2f} [{summary['low']:.2f}, {summary['high']:.2f}]"
