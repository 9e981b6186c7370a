"""One training from folder to folder: load, adapt, train, sanity-check, save.

Trains one seed, or each of several seeds on the same setup. Does not: choose between seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlx_ft.engine.device import memory_limits
from mlx_ft.engine.load import release
from mlx_ft.errors import GateFailed
from mlx_ft.recipe.schema import TrainRecipe
from mlx_ft.runs.folder import seal, writing_stage
from mlx_ft.system.console import Console
from mlx_ft.system.signals import deferred
from mlx_ft.train.adapters import ADAPTER_FILE, load_adapter_weights, save_adapter
from mlx_ft.train.batches import total_updates
from mlx_ft.train.contract import SegmentOver, TrainingInputs, TrainingResult, result_info
from mlx_ft.train.fallbacks import fallbacks
from mlx_ft.train.handoff import TrainRequest, seed_folder
from mlx_ft.train.judge import judge_of
from mlx_ft.train.loop import train
from mlx_ft.train.metrics import Metric
from mlx_ft.train.sanity_check import require_sane, sanity_samples
from mlx_ft.train.selection import whole_model
from mlx_ft.train.setup import Setup


def train_one(
    request: TrainRequest, console: Console, stop_requested: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Train, sanity-check, and leave `adapter/` in the stage's folder; return the manifest's info.

    stop_requested: asks for a stop at the next step, as a signal does.
    Raises GateFailed for a degenerate model, Interrupted after a checkpoint.
    """
    return _train_with(_setup(request, console), request, console, stop_requested)


def train_seeds(
    request: TrainRequest, console: Console, stop_requested: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Train each seed that is not complete into its own folder, sealed with the same info as a
    training alone; return no info.

    A seed that a gate stops is sealed with its faults. Raises Interrupted after a checkpoint.
    With `train.segment_steps`, raises SegmentOver after each seed but the last.
    """
    setup = None
    all_seeds = request.recipe.train.seeds
    for seed in [seed for seed in request.seeds if request.trained(seed) is None]:
        if setup is not None and request.recipe.train.segment_steps is not None:
            raise SegmentOver
        console.say(f"seed {seed} ({all_seeds.index(seed) + 1} of {len(all_seeds)}) begins")
        if setup is not None and not setup.clear(request):
            setup = None
            release()
        if setup is None:
            setup = _setup(request, console)
        one = request.of_seed(seed)
        with writing_stage(request.folder, seed_folder(seed), keep_partial=True) as folder:
            info = _train_or_stop(setup, one, console, stop_requested)
            seal(folder, seed_folder(seed), one.inputs, {"seed": seed, **info})
    return {}


def _setup(request: TrainRequest, console: Console) -> Setup:
    setup = Setup(request)
    console.say(f"computing in {setup.loaded.compute}")
    limits = memory_limits()
    if limits is not None:
        console.say(limits.words)
    return setup


def _train_or_stop(
    setup: Setup, request: TrainRequest, console: Console, stop_requested: Callable[[], bool]
) -> dict[str, Any]:
    try:
        return _train_with(setup, request, console, stop_requested)
    except GateFailed as error:
        for fault in error.faults:
            console.say(f"seed {request.recipe.train.seed} is stopped: {fault}", "red")
        return {"stopped": [vars(fault) for fault in error.faults]}


def _train_with(
    setup: Setup, request: TrainRequest, console: Console, stop_requested: Callable[[], bool]
) -> dict[str, Any]:
    recipe, folder, loaded = request.recipe, request.folder, setup.loaded
    inputs = setup.inputs(request)
    inputs = replace(inputs, judge=judge_of(recipe, loaded, folder))
    assert (inputs.judge is not None) == recipe.train.select.asks
    console.say(inputs.forward.note)
    lost = fallbacks(inputs)
    for each in lost:
        console.say(f"WARNING  {each}", "yellow")
    console.say(_plan_line(inputs))
    result = train_with_progress(inputs, console, stop_requested, setup.remember)
    if recipe.train.select.by is not None:
        console.say(_selected_line(result))
    info = result_info(result, inputs, loaded.compute, lost)
    save_adapter(inputs.model, inputs.adapter_config, folder / "adapter")
    # The written weights are the ones that are checked and handed on.
    load_adapter_weights(inputs.model, folder / "adapter" / ADAPTER_FILE)
    release()
    console.say("looking at five answers before anything is merged")
    with whole_model(inputs):
        inputs.model.eval()
        samples = sanity_samples(loaded, request.sanity_prompts, folder / "samples.jsonl", console)
    if request.sanity_required:
        require_sane(samples)
    release()
    return info


def train_with_progress(
    inputs: TrainingInputs,
    console: Console,
    stop_requested: Callable[[], bool] = lambda: False,
    on_metric: Callable[[Metric], None] = lambda metric: None,
) -> TrainingResult:
    """Train with a line of progress; the first signal stops at the next step."""
    with console.progress("training", 1.0) as progress, deferred(console) as interrupted:

        def stop() -> bool:
            return interrupted() or stop_requested()

        return train(inputs, console, progress, stop, on_metric)


def _strength(recipe: TrainRecipe) -> str:
    if recipe.fine_tune_type == "full":
        return ", every weight of them"
    kind = "" if recipe.fine_tune_type == "lora" else f", {recipe.fine_tune_type}"
    return f"{kind}, scale {recipe.lora_parameters.effective_scale:g}"


def _plan_line(inputs: TrainingInputs) -> str:
    recipe = inputs.recipe
    updates = total_updates(inputs.iterations, recipe.grad_accumulation_steps)
    return (
        f"{inputs.shape.trainable_parameters:,} of {inputs.shape.total_parameters:,} parameters in "
        f"{inputs.shape.num_layers} layers{_strength(recipe)}; "
        f"{inputs.iterations} iterations of {recipe.batch_size} rows = {updates} optimizer updates"
    )


def _selected_line(result: TrainingResult) -> str:
    score = "" if result.chosen_score is None else f"score {result.chosen_score:.3f}, "
    early = ", nothing got better any more" if result.ended_early else ""
    return (
        f"weights of iteration {result.chosen_iteration} are taken: {score}validation loss "
        f"{result.chosen_validation_loss:.4f}; trained to iteration {result.iterations}{early}"
    )
