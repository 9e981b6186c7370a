"""A run is exact: batching, accumulation, interruption and validation do not change the result."""

import errno
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ft.errors import GateFailed, Interrupted, RecipeError
from mlx_ft.runs.folder import seal
from mlx_ft.system.console import Console
from mlx_ft.system.files import read_json, read_json_lines, write_json
from mlx_ft.train.accumulation import build_optimizer, padded_groups
from mlx_ft.train.batches import plan_run
from mlx_ft.train.checkpoint_list import complete_checkpoints
from mlx_ft.train.contract import TrainingInputs
from mlx_ft.train.metrics import Metric
from mlx_ft.train.numerics.batch import Batch
from mlx_ft.train.numerics.forward import Forward
from mlx_ft.train.numerics.losses import cross_entropy_sum
from mlx_ft.train.numerics.packing import Packing
from tests.support.models import stored_arrays
from tests.support.trainings import (
    adapter_of,
    assert_same_bits,
    random_rows,
    train_here,
    trained_past_its_best,
)
from tests.train.conftest import MakeInputs


def optimizer_of(inputs: TrainingInputs) -> dict[str, np.ndarray]:
    newest = complete_checkpoints(inputs.folder / "checkpoints", "inputs")[-1]
    return {n: np.array(a) for n, a in stored_arrays(newest / "optimizer.safetensors").items()}


def test_training_learns(make_inputs: MakeInputs) -> None:
    metrics: list[Metric] = []
    inputs = make_inputs(iterations=80, batch_size=4, learning_rate=3e-3)
    result = train_here(inputs, metrics)
    losses = [m["loss"] for m in metrics if m["kind"] == "train"]
    assert losses[-1] < losses[0] * 0.8
    assert result.iterations == result.updates == 80
    first = next(m for m in metrics if m["kind"] == "validation")
    # A random model is near the uniform distribution over 320 tokens, before anything is trained.
    assert first["iteration"] == 0 and first["loss"] == pytest.approx(np.log(320), rel=0.15)


def test_two_runs_are_the_same_bits(make_inputs: MakeInputs) -> None:
    one, other = (make_inputs(folder=name, dropout=0.1) for name in ("one", "other"))
    train_here(one)
    train_here(other)
    assert_same_bits(adapter_of(one), adapter_of(other))


def test_how_often_it_validates_and_reports_changes_nothing(make_inputs: MakeInputs) -> None:
    often = make_inputs(folder="often", dropout=0.1, steps_per_eval=1, steps_per_report=1)
    seldom = make_inputs(folder="seldom", dropout=0.1, steps_per_eval=100, steps_per_report=100)
    train_here(often)
    train_here(seldom)
    assert_same_bits(adapter_of(often), adapter_of(seldom))


def test_batch_4_is_batch_1_accumulated_4_times(make_inputs: MakeInputs) -> None:
    """Rows of unequal trained length: an average of averages would differ by far more."""
    rows = random_rows(4, seed=9)
    big = make_inputs(rows, "big", iterations=1, batch_size=4, optimizer="sgd")
    small = make_inputs(
        rows, "small", iterations=4, batch_size=1, grad_accumulation_steps=4, optimizer="sgd"
    )
    result = train_here(big), train_here(small)
    assert result[0].updates == result[1].updates == 1
    one, other = adapter_of(big), adapter_of(small)
    step = max(np.abs(one[name]).max() for name in one if name.endswith("lora_b"))
    assert step > 0
    for name in one:
        assert np.abs(one[name] - other[name]).max() < 1e-5 * max(step, 1.0)


def test_the_last_partial_window_is_trained(make_inputs: MakeInputs) -> None:
    """mlx-lm discards the gradients of an unfinished accumulation window."""
    inputs = make_inputs(iterations=6, grad_accumulation_steps=4)
    before = adapter_of(inputs)
    result = train_here(inputs)
    assert result.updates == 2
    assert any(not np.array_equal(before[n], a) for n, a in adapter_of(inputs).items())


@pytest.mark.parametrize("accumulation", [1, 3])
def test_resumed_is_uninterrupted(make_inputs: MakeInputs, accumulation: int) -> None:
    settings = {"dropout": 0.2, "grad_accumulation_steps": accumulation, "optimizer": "adamw"}
    whole = make_inputs(folder="whole", **settings)
    train_here(whole)

    metrics: list[Metric] = []
    for attempt, stop_after in enumerate((4, 3, None)):
        part = make_inputs(folder="part", **settings)
        try:
            train_here(part, metrics, stop_after)
        except Interrupted as error:
            assert "checkpoint written" in str(error), attempt
        else:
            assert stop_after is None
    assert_same_bits(adapter_of(whole), adapter_of(part))
    assert_same_bits(optimizer_of(whole), optimizer_of(part))
    assert _losses(whole.folder) == _losses(part.folder)


def _losses(folder: Path) -> list[tuple[str, int, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(m["kind"], m["iteration"], m["loss"]) for m in map(json.loads, lines)]


def test_a_checkpoint_of_other_inputs_is_not_continued(make_inputs: MakeInputs) -> None:
    with pytest.raises(Interrupted):
        train_here(make_inputs(), stop_after=4)
    other = replace(make_inputs(learning_rate=2e-2), inputs_hash="other inputs")
    metrics: list[Metric] = []
    train_here(other, metrics)
    assert metrics[0]["kind"] == "validation" and metrics[0]["iteration"] == 0


def test_at_least_two_checkpoints_are_kept_and_no_more_than_asked(make_inputs: MakeInputs) -> None:
    inputs = make_inputs(save_every=2, keep_checkpoints=3)
    result = train_here(inputs)
    kept = [
        int(path.name) for path in complete_checkpoints(inputs.folder / "checkpoints", "inputs")
    ]
    assert kept[-3:] == [8, 10, 12]
    assert set(kept[:-3]) <= {result.best_iteration}, "the best one stays as well"


def test_the_best_and_the_pinned_checkpoint_stay(make_inputs: MakeInputs) -> None:
    rates = {"steps_per_eval": 5, "learning_rate": 3e-2}

    def pinned(seed: int) -> TrainingInputs:
        inputs = make_inputs(iterations=40, save_every=5, seed=seed, folder=f"seed-{seed}", **rates)
        (inputs.folder / "checkpoints").mkdir()
        (inputs.folder / "checkpoints" / "0000010.pinned").touch()
        return inputs

    inputs, result = trained_past_its_best(pinned)
    checkpoints = inputs.folder / "checkpoints"
    metrics = read_json_lines(inputs.folder / "metrics.jsonl")
    validations = [m for m in metrics if m["kind"] == "validation" and m["iteration"] > 0]
    best = min(validations, key=lambda m: m["loss"])
    assert result.best_iteration == best["iteration"] < 35, "the test needs a best one before"
    assert result.best_validation_loss == best["loss"]
    kept = {int(path.name) for path in complete_checkpoints(checkpoints, "inputs")}
    assert kept == {10, best["iteration"], 35, 40}
    assert validations[-1]["validations_since_best"] == sum(
        m["iteration"] > best["iteration"] for m in validations
    )


def test_validated_weights_are_weights_that_can_be_saved(make_inputs: MakeInputs) -> None:
    """Between two updates there are gradients in flight: a validation waits for the next one."""
    metrics: list[Metric] = []
    train_here(make_inputs(grad_accumulation_steps=4, steps_per_eval=3), metrics)
    validated = [m["iteration"] for m in metrics if m["kind"] == "validation"]
    assert validated == [0, 4, 8, 12]


def test_a_torn_checkpoint_does_not_exist(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    train_here(inputs)
    *_, older, newest = complete_checkpoints(inputs.folder / "checkpoints", "inputs")
    adapter = newest / "adapters.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1])
    assert complete_checkpoints(inputs.folder / "checkpoints", "inputs")[-1] == older


def test_a_loss_that_is_no_number_stops_with_the_rows(make_inputs: MakeInputs) -> None:
    metrics: list[Metric] = []
    inputs = make_inputs(learning_rate=1e30, optimizer="sgd", iterations=30)
    with pytest.raises(GateFailed, match=r"the loss is (nan|inf)") as caught:
        train_here(inputs, metrics)
    assert "train rows of lines" in str(caught.value) and "3 updates in a row" in str(caught.value)
    assert caught.value.exit_code == 1
    assert [m["update"] for m in metrics if m["kind"] == "skipped"] == [2, 3, 4]


def test_an_update_that_is_not_finite_is_skipped_counted_and_named(
    make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row whose states are no numbers: the run goes on without it."""
    inputs = make_inputs(iterations=13, batch_size=1, steps_per_report=13)
    right = inputs.forward.top

    def broken(
        ids: mx.array, prefix: mx.array, packing: Packing | None, wanted: mx.array | None
    ) -> mx.array:
        is_row = ids.shape == poisoned.shape and bool((ids == poisoned).all().item())
        return right(ids, prefix, packing, wanted) * (float("nan") if is_row else 1.0)

    poisoned = mx.array([inputs.train_rows.row(5)[0][:-1].tolist()])
    monkeypatch.setattr(inputs.forward, "top", broken)  # no model gives such a row by itself
    metrics: list[Metric] = []
    result = train_here(inputs, metrics)
    (skipped,) = [m for m in metrics if m["kind"] == "skipped"]
    assert skipped["lines"] == [6] and result.skipped_updates == 1
    assert all(np.isfinite(array).all() for array in adapter_of(inputs).values())
    (report,) = [m for m in metrics if m["kind"] == "train"]
    assert np.isfinite(report["loss"]) and report["skipped_updates"] == 1


@pytest.mark.parametrize("packs", [False, True])
def test_a_report_says_norm_padding_and_epoch(make_inputs: MakeInputs, packs: bool) -> None:
    metrics: list[Metric] = []
    inputs = make_inputs(batch_size=4, iterations=8, steps_per_report=4)
    inputs.forward.packs = packs
    train_here(inputs, metrics)
    first, second = (m for m in metrics if m["kind"] == "train")
    assert (first["epoch"], second["epoch"]) == (0, 1)
    lengths = inputs.train_rows.lengths - 1
    plans = [[b.rows for b in plan_run(len(inputs.train_rows), 4, 0, 8)][i : i + 4] for i in (0, 4)]
    for report, plan in zip((first, second), plans, strict=True):
        parts = [part for rows in plan for part in padded_groups(lengths, rows, 1024)]
        padded = sum(int(lengths[list(part)].max()) * len(part) for part in parts)
        real = sum(int(lengths[list(rows)].sum()) for rows in plan)
        assert report["padding_share"] == (0 if packs else pytest.approx(1 - real / padded))
        assert packs or padded > real
        assert 0 < report["gradient_norm"] < 1e3


def test_small_micro_batches_train_the_same(make_inputs: MakeInputs) -> None:
    whole = make_inputs(folder="whole", learning_rate=1e-3)
    parts = make_inputs(folder="parts", learning_rate=1e-3, micro_batch_tokens=8)
    train_here(whole)
    train_here(parts)
    one, other = adapter_of(whole), adapter_of(parts)
    largest = max(np.abs(array).max() for array in one.values())
    for name in one:
        assert np.abs(one[name] - other[name]).max() < 1e-3 * largest


def test_a_run_on_cached_states_of_the_disk_has_the_same_bits(
    make_inputs: MakeInputs, tmp_path: Path
) -> None:
    adapters = []
    for folder, cache in (("memory", None), ("first", tmp_path / "c"), ("again", tmp_path / "c")):
        inputs = make_inputs(folder=folder, prefix_folder=cache)
        train_here(inputs)
        adapters.append(adapter_of(inputs))
    assert len(list((tmp_path / "c").iterdir())) == 2, "training and validation rows"
    assert_same_bits(adapters[0], adapters[1])
    assert_same_bits(adapters[0], adapters[2])


def test_frozen_weights_are_let_go_once_their_outputs_are_kept(make_inputs: MakeInputs) -> None:
    kept, computed = make_inputs(folder="kept"), make_inputs(folder="computed")
    computed = replace(computed, prefix_limit_bytes=0)
    for inputs in (kept, computed):
        train_here(inputs)
    sizes = [
        sum(a.nbytes for _, a in tree_flatten(inputs.model.layers[0].parameters()))
        for inputs in (kept, computed)
    ]
    assert sizes[0] == 0 < sizes[1]


@dataclass
class TokenClock:
    """Time that passes by the tokens that go through the model, three times as fast in training."""

    seconds: float = 0.0

    def costing(self, each: int) -> Callable[..., mx.array]:
        def counted(forward: Forward, batch: Batch, *arguments: Any, **options: Any) -> mx.array:
            self.seconds += each * batch.ids.size
            return cross_entropy_sum(forward, batch, *arguments, **options)

        return counted


def test_validations_count_in_the_time_and_not_in_the_pace(
    make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pace is one of training, whatever was validated before; time left knows both."""
    clock = TokenClock()
    now = SimpleNamespace(perf_counter=lambda: clock.seconds)
    monkeypatch.setattr("mlx_ft.train.trainer.time", now)
    monkeypatch.setattr("mlx_ft.train.trainer.cross_entropy_sum", clock.costing(3))
    monkeypatch.setattr("mlx_ft.train.selection.cross_entropy_sum", clock.costing(1))
    metrics: list[Metric] = []
    rows = random_rows(100, seed=2)
    result = train_here(make_inputs(iterations=24, validation_rows=rows), metrics)
    reports = [m for m in metrics if m["kind"] == "train"]
    assert reports[-1]["iteration"] == reports[-1]["iterations"] == 24
    assert all(r["peak_memory_bytes"] > 0 for r in reports)
    validated = {m["iteration"] for m in metrics if m["kind"] == "validation"}
    after = [r["tokens_per_second"] for r in reports if r["iteration"] - 3 in validated]
    others = [r["tokens_per_second"] for r in reports if r["iteration"] - 3 not in validated]
    assert len(after) == len(others) == 4
    # 100 rows cost as much as 8 mini-batches; padding alone makes paces differ.
    assert max(after + others) < 1.5 * min(after + others)
    # Each ends with a validation, so that time and time left are the run's at every second report.
    for report in reports[1::2]:
        whole = report["seconds"] + report["seconds_left"]
        assert result.seconds / 1.25 < whole < 1.25 * result.seconds


def test_a_resumed_run_knows_the_peak_memory_of_the_one_before(make_inputs: MakeInputs) -> None:
    inputs = make_inputs(iterations=12, batch_size=13)
    with pytest.raises(Interrupted):
        train_here(inputs, stop_after=8)
    (state,) = [read_json(path / "state.json") for path in checkpoints_of(inputs)[-1:]]
    assert state["peak_memory_bytes"] > 0
    state["peak_memory_bytes"] *= 1000
    newest = checkpoints_of(inputs)[-1]
    write_json(newest / "state.json", state)
    (newest / "manifest.json").unlink()
    seal(newest, "checkpoint", "inputs", {})
    result = train_here(make_inputs(iterations=12, batch_size=13))
    assert result.peak_memory_bytes == state["peak_memory_bytes"]


def test_a_damaged_checkpoint_is_not_continued_but_the_one_before_it(
    make_inputs: MakeInputs,
) -> None:
    """Its size is right: only its content says that it is not what was written."""
    whole = make_inputs(folder="whole", iterations=16)
    train_here(whole)
    inputs = make_inputs(iterations=16)
    with pytest.raises(Interrupted):
        train_here(inputs, stop_after=9)
    newest = checkpoints_of(inputs)[-1]
    file = newest / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-64:] = bytes(64)
    file.write_bytes(content)
    said = io.StringIO()
    again = make_inputs(iterations=16)
    train_here(again, console=Console(said))
    assert_same_bits(adapter_of(again), adapter_of(whole))
    first, second, *_ = said.getvalue().splitlines()
    assert "optimizer.safetensors: content differs" in first
    assert second == "going on from the checkpoint of iteration 8"


def test_no_whole_checkpoint_is_said_too(make_inputs: MakeInputs) -> None:
    inputs = make_inputs(iterations=8)
    with pytest.raises(Interrupted):
        train_here(inputs, stop_after=5)
    for path in checkpoints_of(inputs):
        (path / "state.json").write_text("{")
    said = io.StringIO()
    train_here(make_inputs(iterations=8), console=Console(said))
    lines = said.getvalue().splitlines()
    assert [line for line in lines if not line.startswith("  iteration")] == [
        "no checkpoint here is whole and of this recipe: training begins anew"
    ]


def checkpoints_of(inputs: TrainingInputs) -> list[Path]:
    return complete_checkpoints(inputs.folder / "checkpoints", "inputs")


@pytest.mark.parametrize("every", [1, 6])
def test_a_validation_loss_that_is_no_number_stops_the_run_in_words(
    make_inputs: MakeInputs, every: int
) -> None:
    inputs = make_inputs(learning_rate=1e30, optimizer="sgd", steps_per_eval=every, save_every=1)
    with pytest.raises(GateFailed, match="learning_rate"):
        train_here(inputs)
    metrics = read_json_lines(inputs.folder / "metrics.jsonl")
    assert all(np.isfinite(m["loss"]) for m in metrics if m["kind"] == "validation")


def test_a_base_model_that_gives_no_number_is_told_apart(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    norm = inputs.model.model.norm
    norm.weight = norm.weight * math.nan
    with pytest.raises(GateFailed, match="before any training"):
        train_here(inputs)


def test_updates_that_were_all_skipped_are_no_training(
    make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(iterations=1, learning_rate=1e-3)
    right = inputs.forward.top

    def broken(*given: Any) -> mx.array:
        return right(*given) * (math.nan if inputs.model.training else 1.0)

    monkeypatch.setattr(inputs.forward, "top", broken)
    with pytest.raises(GateFailed, match="none of 1 updates"):
        train_here(inputs)


def test_metrics_of_a_run_are_not_lost_while_it_goes_on(
    make_inputs: MakeInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies, or a disk that is full, while a resumed run drops the lines after its
    checkpoint leaves all the old ones.
    """
    inputs = make_inputs(iterations=12)
    with pytest.raises(Interrupted):
        train_here(inputs, stop_after=9)
    file = inputs.folder / "metrics.jsonl"
    before = file.read_bytes()
    count = 0

    def full(value: object) -> str:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(errno.ENOSPC, "no space left")
        return json.JSONEncoder().encode(value)

    with monkeypatch.context() as patch:
        patch.setattr("mlx_ft.train.metrics.json.dumps", full)
        with pytest.raises(OSError, match="no space"):
            train_here(make_inputs(iterations=12))
    assert file.read_bytes() == before


def test_validation_has_a_fixed_value_for_fixed_weights(make_inputs: MakeInputs) -> None:
    """mlx-lm draws other batches at each validation: the same weights score differently."""
    metrics: list[Metric] = []
    inputs = make_inputs(learning_rate=1e-12, steps_per_eval=2)
    train_here(inputs, metrics)
    losses = {round(m["loss"], 6) for m in metrics if m["kind"] == "validation"}
    assert len(losses) == 1


def test_every_optimizer_trains(make_inputs: MakeInputs) -> None:
    for name in ("adam", "adamw", "muon", "sgd", "adafactor", "lion"):
        inputs = make_inputs(folder=name, optimizer=name, iterations=2)
        before = adapter_of(inputs)
        train_here(inputs)
        assert any(not np.array_equal(before[n], a) for n, a in adapter_of(inputs).items()), name


def test_an_unknown_optimizer_option_is_the_users_fault(make_inputs: MakeInputs) -> None:
    recipe = make_inputs().recipe.model_copy(update={"optimizer_config": {"weight_decoy": 0.1}})
    with pytest.raises(RecipeError, match="weight_decoy"):
        build_optimizer(recipe)
