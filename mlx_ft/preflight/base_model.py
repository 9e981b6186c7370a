"""Stage entry: is the base model sound? Ask it the suites before training.

Does not: score (`evaluate/`). Its answers are kept where the evaluation finds them.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_ft.evaluate import sample_log
from mlx_ft.evaluate.stage import ask_suites
from mlx_ft.evaluate.suites import Suite
from mlx_ft.job import Job
from mlx_ft.preflight.checks import base_health
from mlx_ft.preflight.findings import findings_json, raise_on_fail
from mlx_ft.preflight.stage import say_finding
from mlx_ft.system.files import read_json, write_json
from mlx_ft.text.repetition import degenerate_reason


def check_base(job: Job, suites: Sequence[Suite]) -> None:
    """Ask the base model what it will be asked at the end, and add to `preflight.json` whether it
    is sound; raises when it is not. Its answers are kept for the evaluation.
    """
    if not suites or "base" not in job.recipe.eval.columns:
        return
    folder = job.folder / "eval.tmp"
    folder.mkdir(exist_ok=True)
    results = ask_suites(job, suites, ["base"], folder)
    answers = [
        (str(record["id"]), str(record["text"]))
        for suite in results["suites"]
        for record in sample_log.recover(folder / suite / "base.jsonl")
    ]
    looping = [(name, why) for name, text in answers if (why := degenerate_reason(text, None))]
    finding = base_health(len(answers), looping, job.recipe.preflight.accept)
    stored = read_json(job.folder / "preflight.json")
    others = [each for each in stored["findings"] if each["check"] != finding.check]
    write_json(
        job.folder / "preflight.json",
        {**stored, "findings": [*others, *findings_json([finding])["findings"]]},
    )
    say_finding(job.console, finding)
    raise_on_fail([finding])
