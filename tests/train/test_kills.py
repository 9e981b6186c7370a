"""A run that is killed 200 times at random moments is the run that nobody disturbed, bit for bit.

Minutes long: `make test-stress`.
"""

import io
import random
import signal
from pathlib import Path

import pytest

from mlx_ft.system.console import Console
from mlx_ft.train.supervisor import last_checkpoint, supervise
from tests.support.models import write_tiny_model
from tests.support.training_processes import Killer, learned, request_in

KILLS = 200


class Impatient(Killer):
    """Kills at any moment after a new checkpoint: in steps, saves, validations and start-ups."""

    def wait_for_a_moment(self) -> None:
        self.done.wait(random.Random(self.left).uniform(0, 1))


@pytest.mark.stress
def test_200_kills_change_nothing(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama", layers=3)
    settings = {"iters": 8000, "save_every": 3, "steps_per_report": 50, "steps_per_eval": 500}
    quiet = request_in(tmp_path / "quiet", base, **settings)
    supervise(quiet, tmp_path / "quiet", Console(io.StringIO()))

    request = request_in(tmp_path / "killed", base, **settings)
    said = io.StringIO()
    killer = Impatient(request, tmp_path / "killed" / "train.control", KILLS, signal.SIGKILL)
    killer.start()
    supervise(request, tmp_path / "killed", Console(said))
    killer.done.set()
    assert killer.left == 0, "the run was over too soon"
    assert said.getvalue().count("the training process died") == KILLS
    assert last_checkpoint(request) == 8000
    assert learned(request) == learned(quiet)
