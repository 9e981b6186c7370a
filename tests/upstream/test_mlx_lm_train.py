"""Faults of the pinned mlx-lm's training loop, each reproduced there and shown absent here.

When a new mlx-lm mends one of them, its half of the test fails: then the fault is history, and the
half can go.
"""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner import trainer
from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
from mlx_lm.tuner.trainer import TrainingArgs, default_loss, iterate_batches
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from mlx_ft.data.tokens import TokenizedSplit, pack_rows
from mlx_ft.engine.adapters import attach_adapter
from mlx_ft.engine.load import load_weights
from mlx_ft.errors import Interrupted, ModelError
from mlx_ft.train.accumulation import padded_groups
from mlx_ft.train.adapters import load_adapter_weights, save_adapter
from mlx_ft.train.batches import plan_epoch, plan_run, plan_validation
from mlx_ft.train.checkpoint_list import complete_checkpoints
from mlx_ft.train.metrics import Metric
from mlx_ft.train.numerics.batch import make_batch
from mlx_ft.train.numerics.losses import cross_entropy_sum
from mlx_ft.train.numerics.prefix_cache import PrefixCache
from mlx_ft.train.schedules import learning_rate_at
from mlx_ft.train.selection import validate
from mlx_ft.train.trainer import Trainer
from tests.support.models import stored_arrays, write_tiny_model
from tests.support.trainings import Steps, quiet, random_rows, train_here
from tests.train.conftest import MakeInputs

LORA = {"rank": 4, "scale": 2.0, "dropout": 0.0}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One architecture is enough here: nothing of it matters."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), "llama", layers=3)


class TheirRows:
    """Rows as mlx-lm's loop wants them: (ids, length of the prompt)."""

    def __init__(self, split: TokenizedSplit) -> None:
        self.rows = [
            (split.row(i)[0].tolist(), int(np.flatnonzero(split.row(i)[1])[0]))
            for i in range(len(split))
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[list[int], int]:
        return self.rows[index]


def their_model(folder: Path, seed: int = 0) -> nn.Module:
    model, _, _ = load_weights(folder)
    model.freeze()
    mx.random.seed(seed)
    linear_to_lora_layers(model, 2, LORA)
    return model


def their_run(
    model: nn.Module, place: Path, iters: int, rate: float = 1e-2, **changes: object
) -> Path:
    """Train as mlx_lm.lora does, from its seeds on; return the adapter's file."""
    np.random.seed(0)
    values = {"batch_size": 4, "steps_per_eval": 1000, "steps_per_save": 1000}
    file = place / "adapters.safetensors"
    arguments = TrainingArgs(iters=iters, adapter_file=str(file), **(values | changes))
    rows = TheirRows(random_rows(13, seed=1))
    trainer.train(model, optimizers.Adam(learning_rate=rate), rows, rows, arguments)
    return file


def adapter_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {n: np.array(a) for n, a in tree_flatten(model.trainable_parameters())}


def one_row(prompt: int, answer: int) -> TokenizedSplit:
    ids = np.arange(5, 5 + prompt + answer, dtype=np.int32)
    trained = np.array([0] * prompt + [1] * answer, np.uint8)
    return pack_rows([(ids, trained)], [1])


def test_saving_writes_over_the_good_file(make_inputs: MakeInputs, tmp_path: Path) -> None:
    """A kill in between leaves neither the old weights nor the new ones."""
    file = tmp_path / "adapters.safetensors"
    mx.save_safetensors(str(file), {"a": mx.zeros(4)})
    before = file.stat().st_ino
    mx.save_safetensors(str(file), {"a": mx.ones(4)})
    assert file.stat().st_ino == before, "theirs: the same file, cut and written again"
    inputs = make_inputs(save_every=2, iterations=4)
    train_here(inputs)
    folders = complete_checkpoints(inputs.folder / "checkpoints", "inputs")
    inodes = {(folder / "adapters.safetensors").stat().st_ino for folder in folders}
    assert len(inodes) == 2 and all((folder / "manifest.json").exists() for folder in folders)


def test_a_resumed_run_is_another_run(
    model_folder: Path, make_inputs: MakeInputs, tmp_path: Path
) -> None:
    whole = their_model(model_folder)
    their_run(whole, tmp_path, 8)
    part = their_model(model_folder)
    file = their_run(part, tmp_path, 4)
    resumed = their_model(model_folder)
    resumed.load_weights(str(file), strict=False)
    their_run(resumed, tmp_path, 4)
    one, other = adapter_of(whole), adapter_of(resumed)
    apart = max(np.abs(one[n] - other[n]).max() for n in one)
    assert apart > 0.1 * max(np.abs(one[n]).max() for n in one if n.endswith("lora_b"))

    mine = make_inputs(folder="whole", iterations=8)
    train_here(mine)
    with pytest.raises(Interrupted):
        train_here(make_inputs(folder="part", iterations=8), stop_after=4)
    again = make_inputs(folder="part", iterations=8)
    train_here(again)
    for name, array in adapter_of(mine.model).items():
        assert array.tobytes() == adapter_of(again.model)[name].tobytes()


def test_weights_of_another_rank_are_loaded_in_silence(
    model_folder: Path, make_inputs: MakeInputs, tmp_path: Path
) -> None:
    inputs = make_inputs()
    small = {n: mx.zeros((2, 2)) for n, _ in tree_flatten(inputs.model.trainable_parameters())}
    file = tmp_path / "adapters.safetensors"
    mx.save_safetensors(str(file), small)
    theirs = their_model(model_folder)
    theirs.load_weights(str(file), strict=False)
    assert all(a.shape == (2, 2) for _, a in tree_flatten(theirs.trainable_parameters()))
    with pytest.raises(ModelError, match="shape"):
        load_adapter_weights(inputs.model, file)


def test_an_adapter_without_some_of_its_tensors_is_loaded_in_silence(
    model_folder: Path, make_inputs: MakeInputs, tmp_path: Path
) -> None:
    inputs = make_inputs()
    save_adapter(inputs.model, inputs.adapter_config, tmp_path)
    file = tmp_path / "adapters.safetensors"
    weights = stored_arrays(file)
    lost = sorted(weights)[0]
    mx.save_safetensors(str(file), {n: a for n, a in weights.items() if n != lost})
    theirs, _, _ = load_weights(model_folder)
    load_adapters(theirs, str(tmp_path))
    ours, _, _ = load_weights(model_folder)
    with pytest.raises(ModelError, match="missing from the adapter"):
        attach_adapter(ours, tmp_path)


def test_numbered_checkpoints_pile_up(
    model_folder: Path, make_inputs: MakeInputs, tmp_path: Path
) -> None:
    their_run(their_model(model_folder), tmp_path, 6, steps_per_save=1)
    assert len(list(tmp_path.glob("*_adapters.safetensors"))) == 6
    inputs = make_inputs(iterations=6, save_every=1)
    train_here(inputs)
    assert len(complete_checkpoints(inputs.folder / "checkpoints", "inputs")) == 2


def test_a_padding_token_is_trained_after_every_row(make_inputs: MakeInputs) -> None:
    rows = one_row(prompt=3, answer=2)
    inputs = make_inputs(rows)
    batch, lengths = next(iter(iterate_batches(TheirRows(rows), 1, 2048)))
    _, counted = default_loss(inputs.model, batch, lengths)
    assert counted.item() == 3, "theirs: two tokens of the answer, and one of the padding"
    assert make_batch(rows, (0,)).trained_tokens == 2
    assert make_batch(rows, (0,)).targets.tolist() == [8, 9]


def test_a_row_without_an_answer_makes_the_loss_no_number(make_inputs: MakeInputs) -> None:
    rows = pack_rows(
        [*(one_row(3, 2).row(0),), (np.arange(5, 40, dtype=np.int32), np.zeros(35, np.uint8))],
        [1, 2],
    )
    inputs = make_inputs(rows, iterations=4, batch_size=1, steps_per_report=2)  # both rows a report
    prompt_only = mx.array([rows.row(1)[0].tolist()])
    loss, _ = default_loss(inputs.model, prompt_only, mx.array([[35, 34]]))
    assert np.isnan(loss.item()), "theirs: nothing divided by nothing, into every weight"
    result = train_here(inputs)
    assert np.isfinite(result.final_train_loss)
    assert all(np.isfinite(array).all() for array in adapter_of(inputs.model).values())


def test_rows_are_sorted_by_the_number_of_their_keys() -> None:
    lengths = np.random.default_rng(0).integers(4, 400, 64)
    rows = [{"messages": [{"role": "user", "content": "x" * int(n)}]} for n in lengths]
    theirs = CacheDataset(ChatDataset(rows, tokenizer=None))
    assert {theirs.itemlen(index) for index in range(len(rows))} == {1}

    def padding(batches: list[list[int]]) -> float:
        padded = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
        return 1 - int(lengths.sum()) / padded

    in_file_order = [list(range(start, start + 4)) for start in range(0, 64, 4)]
    ours = [
        list(group)
        for batch in plan_epoch(len(lengths), 4, 0, 0)
        for group in padded_groups(lengths, batch.tolist(), 10**6)
    ]
    assert padding(in_file_order) > 0.25 and padding(ours) < 0.06


def test_the_last_rows_are_never_trained() -> None:
    split = random_rows(13, seed=1)
    theirs = [batch for batch, _ in iterate_batches(TheirRows(split), 4, 2048)]
    assert sum(batch.shape[0] for batch in theirs) == 12
    ours = [row for batch in plan_run(len(split), 4, 0, 4) for row in batch.rows]
    assert sorted(ours) == list(range(13))


def test_accumulation_averages_averages(make_inputs: MakeInputs) -> None:
    """One row with 2 trained tokens and one with 20: in theirs, both weigh the same."""
    rows = pack_rows([one_row(3, 2).row(0), one_row(3, 20).row(0)], [1, 2])
    inputs = make_inputs(rows)
    cache = PrefixCache(inputs.forward, rows, 1 << 20)
    batches = [make_batch(rows, (index,)) for index in (0, 1)]
    sums = [cross_entropy_sum(inputs.forward, b, cache.batch(b)).item() for b in batches]
    whole = make_batch(rows, (0, 1))
    exact = cross_entropy_sum(inputs.forward, whole, cache.batch(whole)).item() / 22
    theirs = (sums[0] / 2 + sums[1] / 20) / 2
    assert sum(sums) / 22 == pytest.approx(exact, rel=1e-5)
    assert abs(theirs - exact) > 1e-3


def test_the_last_window_is_thrown_away_and_schedules_end_early(
    model_folder: Path, make_inputs: MakeInputs, tmp_path: Path
) -> None:
    steps: list[int] = []

    def rate(step: mx.array) -> mx.array:
        return mx.array(1e-2) * (1 - step / 10)

    model = their_model(model_folder)
    optimizer = optimizers.Adam(learning_rate=rate)
    rows = TheirRows(random_rows(13, seed=1))
    arguments = TrainingArgs(
        batch_size=4,
        iters=10,
        grad_accumulation_steps=4,
        adapter_file=str(tmp_path / "adapters.safetensors"),
    )
    trainer.train(model, optimizer, rows, None, arguments)
    steps.append(int(optimizer.step.item()))
    assert steps == [2], "theirs: 10 mini-batches make 2 updates; the last 2 are lost"
    assert optimizer.learning_rate.item() > 0.8e-2, "and the rate has hardly begun to fall"

    metrics: list[Metric] = []
    inputs = make_inputs(
        iterations=10, grad_accumulation_steps=4, lr_schedule={"name": "linear"}, iters=10
    )
    assert train_here(inputs, metrics).updates == 3
    schedule = learning_rate_at(inputs.recipe.lr_schedule, 1.0, 3)
    assert [round(schedule(update), 6) for update in range(4)] == [1.0, 0.666667, 0.333333, 0.0]


def test_validation_is_a_draw_and_changes_the_training(
    model_folder: Path, make_inputs: MakeInputs, tmp_path: Path
) -> None:
    rows = TheirRows(random_rows(13, seed=1))
    model = their_model(model_folder)
    np.random.seed(0)
    losses = {trainer.evaluate(model, rows, batch_size=2, num_batches=2) for _ in range(4)}
    assert len(losses) > 1, "theirs: the same weights, other losses"
    often, seldom = their_model(model_folder), their_model(model_folder)
    their_run(often, tmp_path, 8, steps_per_eval=1, val_batches=1)
    their_run(seldom, tmp_path, 8, steps_per_eval=8, val_batches=1)
    apart = [np.abs(a - adapter_of(seldom)[n]).max() for n, a in adapter_of(often).items()]
    assert max(apart) > 1e-3, "theirs: how often it validates decides what is learned"

    lengths = random_rows(13, seed=1).lengths
    assert plan_validation(lengths, 2, 2) == plan_validation(lengths, 2, 2)
    each_inputs = [make_inputs(folder=str(n), steps_per_eval=n, iterations=8) for n in (1, 8)]
    for inputs in each_inputs:
        train_here(inputs)
    one, other = (adapter_of(inputs.model) for inputs in each_inputs)
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_losses_are_reported_of_other_weights_than_those_saved(make_inputs: MakeInputs) -> None:
    """Theirs validates before a step and saves after it; the last weights are never measured."""
    metrics: list[Metric] = []
    inputs = make_inputs(iterations=6, steps_per_eval=6, save_every=6)
    train_here(inputs, metrics)
    last = [m for m in metrics if m["kind"] == "validation"][-1]
    newest = complete_checkpoints(inputs.folder / "checkpoints", "inputs")[-1]
    fresh = make_inputs(folder="fresh")
    load_adapter_weights(fresh.model, newest / "adapters.safetensors")
    measured: list[Metric] = []
    again = replace(fresh, iterations=0)
    mine = Trainer(again, quiet(), Steps(), measured.append)
    validate(mine)
    mine.metrics.close()
    assert int(newest.name) == last["iteration"] == 6
    assert measured[-1]["loss"] == pytest.approx(last["loss"], rel=1e-6)
