"""Does survival say what a suite will? One trained adapter, stored in five ways: a table.

Of a trained run the fused model is rounded to 4, 5, 6 and 8 bits and quantized to 5 by GPTQ, each
into a folder of its own. Survival is the export's: what each keeps of the adapter's effect on the
held-out rows (rounded models as they would be stored, not read back). Scores are the evaluation's:
each folder, and base and adapter unquantized, answers the suite. What is written, compared or
answered is not done again.

Usage: python -m tests.benchmarks.survival RUN [--suite code_mode] [--work bench-survival]
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlx_ft.errors import Fault, RunError
from mlx_ft.evaluate.harness import evaluate_column
from mlx_ft.evaluate.local_model import ModelSource, local_column
from mlx_ft.evaluate.stage import suite_progress
from mlx_ft.evaluate.suites import Suite
from mlx_ft.export.stage import export_inputs
from mlx_ft.inputs import OpenRun, open_run
from mlx_ft.job import Job
from mlx_ft.model.chat import ChatFormat
from mlx_ft.recipe.load import load_recipe
from mlx_ft.recipe.schema import Q_BITS
from mlx_ft.runs.folder import complete_stage
from mlx_ft.system.console import Console
from mlx_ft.system.files import hash_of, read_json, write_json
from mlx_ft.text.quantities import interval, score


@dataclass(frozen=True)
class Way:
    """One way of storing the fused model, `found` under this name by the export's comparison."""

    bits: int
    method: str
    found: str

    @property
    def name(self) -> str:
        return f"q{self.bits}-{self.method}"


GPTQ = Way(5, "gptq", "quantized")
WAYS = (*(Way(bits, "round", f"round-{bits}") for bits in Q_BITS), GPTQ)
ADAPTER = "adapter"


def open_trained(run: Path, console: Console) -> OpenRun:
    """Return the run of a folder, which nothing is written to; RunError when it is not trained."""
    loaded = load_recipe(run / "recipe.yaml", ["export.q_method=gptq"])
    found = open_run(loaded, run.parent, console)
    if complete_stage(run, "train", found.job.inputs["train"]) is None:
        where, what = str(run / "train"), "not whole, or made of other rows or by another version"
        raise RunError(Fault(where, what, "name the folder of a run that this version trained"))
    return replace(found, job=replace(found.job, folder=run))


def write_ways(opened: OpenRun, work: Path) -> None:
    """Write each folder that is not there yet, and what the comparison says of them."""
    from mlx_ft.engine.load import release
    from mlx_ft.export.bit_widths import Bits, described_quantization
    from mlx_ft.export.fuse import fuse
    from mlx_ft.export.layerwise_models import layerwise_fault
    from mlx_ft.export.model_folder import finish_folder
    from mlx_ft.export.quantize import Method, quantize_into
    from mlx_ft.export.verify_models import Steps, compare_models

    missing = [way for way in WAYS if not (work / way.name / "config.json").exists()]
    if not missing and (work / "compared.json").exists():
        return
    job = opened.job
    export = export_inputs(job, opened.suites, opened.original, work)
    recipe, into = export.recipe, export.fused_into
    by_layers = layerwise_fault(export.base, export.adapter, export.longest_row) is None
    release()
    for way in missing:
        job.console.heading(f"{way.bits} bits, {way.method}")
        remove(work / way.name)
        fused = fuse(into, export.adapter, recipe.dtype)
        asked = recipe.model_copy(update={"q_method": way.method})
        method = Method(asked, Bits(way.bits), export.calibration, by_layers)
        quantize_into(work / way.name, fused, method, None, job.console, None)
        config = described_quantization(fused.config, Bits(way.bits), recipe.q_group_size)
        finish_folder(work / way.name, export.base, config, f"# {job.folder.name}, {way.name}\n")
        release()
    steps = Steps(
        base=export.base,
        adapter=export.adapter,
        original=export.original,
        fused=fuse(into, export.adapter, recipe.dtype),
        fused_folder=None,
        small_folder=work / GPTQ.name,
        bits=Bits(GPTQ.bits),
        group_size=recipe.q_group_size,
    )
    job.console.heading("Survival")
    with job.console.progress("comparing", 1.0) as progress:
        compared = compare_models(steps, export.passages, by_layers, progress)
    held_out = {name: asdict(each) for name, each in compared.from_adapter["held_out"].items()}
    write_json(work / "compared.json", {"held_out": held_out, "positions": compared.positions})
    release()


def remove(folder: Path) -> None:
    """Remove what was begun and not finished: weights alone, without a config."""
    for file in folder.glob("*"):
        file.unlink()


def scored(job: Job, work: Path, suite: Suite) -> dict[str, Mapping[str, Any]]:
    """Return the summary of the suite for base, adapter and each way; answers are kept."""
    chat, base = ChatFormat.of(job.recipe.chat), job.model.path
    places: dict[str, tuple[Path, Path | None]] = {
        "base": (base, None),
        ADAPTER: (base, job.folder / "train" / "adapter"),
        **{way.name: (work / way.name, None) for way in WAYS},
    }
    summaries = {}
    for name, (folder, adapter) in places.items():
        column = local_column(
            name,
            ModelSource(folder, adapter, chat),
            hash_of([name, job.inputs["train"]]),
            batch_size=job.recipe.eval.batch_size,
        )
        with suite_progress(job.console, [suite], 1) as progress:
            (result,) = evaluate_column([suite], column, work / "eval", progress=progress)
        summaries[name] = result.summary
    return summaries


def table(
    suite: str,
    held_out: Mapping[str, Mapping[str, float]],
    summaries: Mapping[str, Mapping[str, Any]],
) -> str:
    """Return the table: how stored, nats from the adapter, survival, score."""
    from mlx_ft.export.survival.measures import Divergence, model_survival

    learned = Divergence(**held_out["base"])
    lines = [
        f"| stored | nats from the adapter | other top token | survival | {suite} (95 %) |",
        "|---|---|---|---|---|",
    ]

    def put(stored: str, name: str, found: Divergence | None) -> None:
        cells = ["", "", ""]
        if found is not None:
            kept = model_survival(learned, found)
            words = "unknown" if kept is None else "below 0" if kept < 0 else f"{kept:.3f}"
            cells = [f"{found.nats:.4f}", f"{found.flips:.1%}", words]
        summary = summaries[name]
        ends = interval(summary["low"], summary["high"]).replace("\N{EN DASH}", " to ")
        row = [stored, *cells, f"{score(summary['mean'])} ({ends})"]
        lines.append(f"| {' | '.join(row)} |")

    put("base", "base", learned)
    put("adapter", ADAPTER, None)
    for way in WAYS:
        given = held_out.get(way.found)
        found = None if given is None else Divergence(**given)
        put(f"{way.bits} bits, {way.method}", way.name, found)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run whose training is complete")
    parser.add_argument("--suite", default="code_mode", help="one of the suites of its recipe")
    parser.add_argument("--work", type=Path, default=Path("bench-survival"))
    arguments = parser.parse_args()
    console = Console()
    opened = open_trained(arguments.run.resolve(), console)
    job = opened.job
    suites = {suite.name: suite for suite in opened.suites}
    if arguments.suite not in suites:
        parser.error(f"--suite {arguments.suite}: the recipe has {', '.join(suites)}")
    work = arguments.work.resolve() / job.folder.name
    work.mkdir(parents=True, exist_ok=True)
    write_ways(opened, work)
    summaries = scored(job, work, suites[arguments.suite])
    compared = read_json(work / "compared.json")
    print(table(arguments.suite, compared["held_out"], summaries))
    print(f"\n{compared['positions']['held_out']} held-out positions, {job.folder.name}")


if __name__ == "__main__":
    main()
