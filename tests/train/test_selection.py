"""The chosen weights are the best that were looked at, and looking changes nothing else."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_ft.engine.generate import generate
from mlx_ft.engine.load import LoadedModel, load_model
from mlx_ft.errors import Interrupted
from mlx_ft.model.chat import ChatFormat, ChatRenderer
from mlx_ft.recipe.schema import SelectRecipe
from mlx_ft.system.console import Progress
from mlx_ft.train.adapters import ADAPTER_FILE, save_adapter
from mlx_ft.train.checkpoint_list import CHECKPOINTS, complete_checkpoints
from mlx_ft.train.contract import Judge, Judgement, TrainingInputs
from mlx_ft.train.metrics import Metric
from tests.support.trainings import adapter_of, assert_same_bits, train_here, trained_past_its_best
from tests.train.conftest import MakeInputs

PROMPTS = [[5, 9, 17], [30, 31, 32, 33, 34]]
SUITE = SelectRecipe(suite="suite.yaml", every=4)


def loaded_of(inputs: TrainingInputs, folder: Path) -> LoadedModel:
    renderer = ChatRenderer.from_folder(folder, ChatFormat())
    return LoadedModel(inputs.model, renderer, {}, "float32")


def judged(
    inputs: TrainingInputs, folder: Path, said: list[list[tuple[int, ...]]]
) -> TrainingInputs:
    """Return the inputs with a judge whose score comes from what the model generates."""

    def ask(iteration: int, progress: Progress) -> Judgement:
        answers = generate(loaded_of(inputs, folder), PROMPTS, max_tokens=8)
        said.append([answer.ids for answer in answers])
        progress.update(1.0)
        score = (sum(map(sum, said[-1])) % 7) / 7
        return Judgement("suite", score, len(PROMPTS), 0.0, 1.0)

    return replace(inputs, judge=Judge(ask, 30))


def scored(inputs: TrainingInputs, scores: dict[int, float]) -> TrainingInputs:
    def ask(iteration: int, progress: Progress) -> Judgement:
        return Judgement("suite", scores[iteration], 1, 0.0, 1.0)

    return replace(inputs, judge=Judge(ask, 1))


def lines_of(inputs: TrainingInputs, kind: str) -> list[Metric]:
    lines = map(json.loads, (inputs.folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def checkpoint(inputs: TrainingInputs, iteration: int) -> dict[str, bytes]:
    from safetensors.numpy import load_file

    file = inputs.folder / CHECKPOINTS / f"{iteration:07d}" / ADAPTER_FILE
    return {name: array.tobytes() for name, array in load_file(file).items()}


@pytest.mark.parametrize("low_memory", [False, True])
def test_what_is_asked_is_the_model_with_its_frozen_layers(
    make_inputs: MakeInputs, model_folder: Path, tmp_path: Path, low_memory: bool
) -> None:
    """They were let go before; the answers are those of the saved adapter on a fresh base."""
    said: list[list[tuple[int, ...]]] = []
    inputs = judged(make_inputs(select=SUITE, low_memory=low_memory), model_folder, said)
    train_here(inputs)
    assert inputs.forward.frozen_released and len(said) == 3
    last = tmp_path / "last"
    save_adapter(inputs.model, inputs.adapter_config, last)
    (last / ADAPTER_FILE).write_bytes(
        (
            complete_checkpoints(inputs.folder / CHECKPOINTS, "inputs")[-1] / ADAPTER_FILE
        ).read_bytes()
    )
    fresh = load_model(model_folder, ChatFormat(), adapter=last, low_memory=low_memory)
    answers = generate(fresh, PROMPTS, max_tokens=8)
    assert said[-1] == [answer.ids for answer in answers]


def test_asking_changes_no_training_bit(make_inputs: MakeInputs, model_folder: Path) -> None:
    said: list[list[tuple[int, ...]]] = []
    plain = make_inputs(folder="plain", dropout=0.1)
    asked = judged(make_inputs(folder="asked", dropout=0.1, select=SUITE), model_folder, said)
    often = judged(
        make_inputs(folder="often", dropout=0.1, select=SUITE.model_copy(update={"every": 1})),
        model_folder,
        said,
    )
    for inputs in (plain, asked, often):
        train_here(inputs)
    assert checkpoint(plain, 12) == checkpoint(asked, 12) == checkpoint(often, 12)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_resumed_is_uninterrupted_with_selection(
    make_inputs: MakeInputs, model_folder: Path, accumulation: int
) -> None:
    settings = {"dropout": 0.2, "grad_accumulation_steps": accumulation, "select": SUITE}
    said: list[list[tuple[int, ...]]] = []
    whole = judged(make_inputs(folder="whole", **settings), model_folder, said)
    result = train_here(whole)
    for stop_after in (5, 3, None):
        part = judged(make_inputs(folder="part", **settings), model_folder, said)
        try:
            again = train_here(part, stop_after=stop_after)
        except Interrupted:
            assert stop_after is not None
        else:
            assert stop_after is None
    assert_same_bits(adapter_of(whole), adapter_of(part))
    for kind in ("selection", "validation"):
        assert lines_of(whole, kind) == lines_of(part, kind)
    chosen = ("chosen_iteration", "chosen_score", "chosen_validation_loss", "iterations")
    assert [getattr(result, name) for name in chosen] == [getattr(again, name) for name in chosen]


def test_the_best_score_is_taken_and_ties_go_by_validation_loss(make_inputs: MakeInputs) -> None:
    scores = {2: 0.5, 4: 0.75, 6: 0.25, 8: 0.75, 10: 0.75, 12: 0.5}
    select = SelectRecipe(suite="suite.yaml", every=2)
    inputs = scored(make_inputs(select=select, learning_rate=3e-3, steps_per_eval=100), scores)
    result = train_here(inputs)
    losses = {m["iteration"]: m["loss"] for m in lines_of(inputs, "validation")}
    best = min((4, 8, 10), key=lambda iteration: losses[iteration])
    assert (result.chosen_iteration, result.chosen_score) == (best, 0.75)
    assert result.chosen_validation_loss == losses[best]
    now = {name: array.tobytes() for name, array in adapter_of(inputs).items()}
    assert now == checkpoint(inputs, best) != checkpoint(inputs, 12)


def test_patience_ends_a_run_and_a_crash_after_it_does_not_begin_it_again(
    make_inputs: MakeInputs,
) -> None:
    scores = {2: 0.5, 4: 0.25, 6: 0.25}
    select = SelectRecipe(suite="suite.yaml", every=2, patience=2)
    inputs = scored(make_inputs(select=select, steps_per_report=100, save_every=100), scores)
    result = train_here(inputs)
    assert (result.iterations, result.chosen_iteration, result.ended_early) == (6, 2, True)
    again = scored(make_inputs(select=select, steps_per_report=100, save_every=100), {})
    assert replace(train_here(again), peak_memory_bytes=0) == replace(result, peak_memory_bytes=0)
    assert_same_bits(adapter_of(inputs), adapter_of(again))


@pytest.mark.slow
def test_validation_loss_alone_can_choose(make_inputs: MakeInputs) -> None:
    select = SelectRecipe(metric="validation_loss", every=5)
    inputs, result = trained_past_its_best(
        lambda seed: make_inputs(
            iterations=40,
            steps_per_eval=5,
            learning_rate=3e-2,
            select=select,
            seed=seed,
            folder=f"seed-{seed}",
        )
    )
    losses = {m["iteration"]: m["loss"] for m in lines_of(inputs, "validation") if m["iteration"]}
    best = min(losses, key=lambda iteration: losses[iteration])
    assert result.chosen_iteration == best < 40 and result.chosen_score is None
    now = {name: array.tobytes() for name, array in adapter_of(inputs).items()}
    assert now == checkpoint(inputs, best)


def test_without_selection_the_last_weights_are_taken(make_inputs: MakeInputs) -> None:
    inputs, result = trained_past_its_best(
        lambda seed: make_inputs(
            iterations=40, steps_per_eval=5, learning_rate=3e-2, seed=seed, folder=f"seed-{seed}"
        )
    )
    assert result.best_iteration < result.chosen_iteration == 40
    assert result.chosen_validation_loss == result.final_validation_loss
    now = {name: array.tobytes() for name, array in adapter_of(inputs).items()}
    assert now == checkpoint(inputs, 40) and np.isfinite(result.final_validation_loss)
