"""A training that does not take the whole fast way says so, and what that costs."""

from dataclasses import replace
from pathlib import Path

import pytest

from mlx_ft.runs import document
from mlx_ft.runs.folder import seal
from mlx_ft.runs.reader import ArtifactReader
from mlx_ft.train.contract import TrainingInputs, result_info
from mlx_ft.train.fallbacks import fallbacks, more_work, padding_share
from mlx_ft.train.numerics.batch import make_batch
from mlx_ft.train.numerics.forward import PlainForward
from tests.support.trainings import random_rows, train_here
from tests.train.conftest import MakeInputs


def plain(inputs: TrainingInputs) -> TrainingInputs:
    return replace(inputs, forward=PlainForward(inputs.model, "plain forward: asked for"))


def test_the_whole_fast_way_has_no_warning(make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    assert inputs.forward.choice.packs and inputs.forward.choice.skips
    assert fallbacks(inputs) == ()


def test_the_plain_forward_says_why_and_what_it_costs(make_inputs: MakeInputs) -> None:
    inputs = plain(make_inputs(iterations=40))
    (told,) = fallbacks(inputs)
    assert told.startswith("plain forward: asked for: ")
    assert "1 frozen layers run in every epoch" in told and "rows are padded" in told
    once = plain(make_inputs(iterations=1))
    assert "frozen" not in fallbacks(once)[0], "one epoch computes them once either way"


@pytest.mark.parametrize("lost", ["packs", "skips"])
def test_a_part_alone_is_told_alone(make_inputs: MakeInputs, lost: str) -> None:
    inputs = make_inputs()
    choice = inputs.forward.choice
    changed = replace(choice, packs=False) if lost == "packs" else replace(choice, skips=False)
    inputs.forward.choice = changed
    (told,) = fallbacks(inputs)
    assert ("padded" in told) == (lost == "packs")


@pytest.mark.parametrize(("frozen", "trained", "epochs"), [(18, 12, 2), (16, 12, 3), (1, 30, 1)])
def test_more_work_is_that_of_the_layers(frozen: int, trained: int, epochs: int) -> None:
    fast = frozen + 2 * trained * epochs
    assert more_work(frozen, trained, epochs) == pytest.approx(
        (frozen * epochs + 2 * trained * epochs) / fast - 1
    )


def test_padding_is_that_of_the_batches(make_inputs: MakeInputs) -> None:
    rows = random_rows(8, seed=4)
    inputs = make_inputs(rows, batch_size=4, micro_batch_tokens=10**6)
    batches = [make_batch(rows, tuple(range(first, first + 4))) for first in (0, 4)]
    padded, real = (sum(getattr(b, n) for b in batches) for n in ("padded_tokens", "tokens"))
    assert 0 <= padding_share(inputs) <= padded / real - 1 + 1e-9


def test_it_stands_in_the_manifest_and_among_the_warnings(
    make_inputs: MakeInputs, tmp_path: Path
) -> None:
    inputs = plain(make_inputs())
    told = fallbacks(inputs)
    info = result_info(train_here(inputs), inputs, "float32", told)
    assert info["forward"]["name"] == "plain" and info["forward"]["fallbacks"] == list(told)
    run = tmp_path / "run"
    (run / "train").mkdir(parents=True)
    seal(run / "train", "train", "inputs", info)
    assert document.read_document(ArtifactReader(run))["warnings"] == list(told)
