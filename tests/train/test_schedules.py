"""Learning rates count optimizer updates, start and end where the recipe says."""

import math

import mlx.optimizers as optimizers
import pytest

from mlx_ft.recipe.schema import LrSchedule
from mlx_ft.train.schedules import learning_rate_at


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine_with_restarts"])
def test_warm_up_reaches_the_peak_and_decay_reaches_the_end(name: str) -> None:
    end = {} if name == "constant" else {"end": 1e-6}
    schedule = LrSchedule.model_validate({"name": name, "warmup_ratio": 0.1, **end})
    rate = learning_rate_at(schedule, 1e-3, 100)
    assert rate(0) == 0.0
    assert rate(10) == pytest.approx(1e-3)
    assert rate(100) == pytest.approx(1e-3 if name == "constant" else 1e-6)
    assert all(0.0 <= rate(update) <= 1e-3 for update in range(100))


def test_cosine_is_that_of_mlx() -> None:
    schedule = LrSchedule(name="cosine", end=1e-7)
    ours = learning_rate_at(schedule, 1e-5, 1000)
    theirs = optimizers.cosine_decay(1e-5, 1000, 1e-7)
    for update in (0, 1, 250, 999, 1000, 1500):
        assert ours(update) == pytest.approx(float(theirs(update).item()), rel=1e-4)


def test_restarts_go_back_to_the_peak_at_each_cycle() -> None:
    rate = learning_rate_at(LrSchedule(name="cosine_with_restarts", cycles=2), 1.0, 100)
    assert rate(50) == pytest.approx(1.0)
    assert rate(49) < 0.01
    assert rate(25) == pytest.approx(0.5)


def test_warm_up_counts() -> None:
    assert LrSchedule(warmup_ratio=0.1).warmup_updates(25) == 3
    assert LrSchedule(warmup_steps=7).warmup_updates(25) == 7
    assert LrSchedule().warmup_updates(25) == 0


def test_linear_is_a_line() -> None:
    rate = learning_rate_at(LrSchedule(name="linear"), 1.0, 10)
    assert [round(rate(update), 6) for update in (0, 5, 9, 10)] == [1.0, 0.5, 0.1, 0.0]
    assert not math.isnan(rate(0))
