"""What must hold on a real GPU, with nothing emulated: `make test-gpu`, on Metal or CUDA.

With MLX_FT_AS_GPU=1 a CPU takes the same way, which shows that the tests themselves work.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ft.doctor.checks import guarded
from mlx_ft.doctor.examine import all_checks
from mlx_ft.engine.device import configure_backend, on_cpu
from mlx_ft.system.cache import cache_home
from mlx_ft.train.numerics.forward import PlainForward, SplitForward, choose_forward
from mlx_ft.train.numerics.shared_start import choose_start
from tests.support.gpu import BASE_TYPES, GPU_CONFIGS, write_gpu_model
from tests.support.split_models import adapted, rows_of
from tests.support.trainings import random_rows
from tests.train.test_gpu_way import PlantedFault, planted_faults
from tests.train.test_sixteen_bits import likeness, trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(on_cpu(), reason="no GPU here: MLX computes on the CPU"),
]
LORA = {"lora_parameters": {"rank": 4, "alpha": 8.0}}


@pytest.fixture(autouse=True)
def configured() -> None:
    configure_backend()


@pytest.mark.parametrize("base_type", BASE_TYPES)
@pytest.mark.parametrize("kind", GPU_CONFIGS)
def test_every_type_gets_the_whole_fast_way(tmp_path: Path, kind: str, base_type: str) -> None:
    if kind == "qwen3_moe" and mx.default_device() == mx.Device(mx.cpu):
        pytest.skip("a CPU multiplies experts in float32 only")
    model = adapted(write_gpu_model(tmp_path / "base", kind, base_type), 2)
    for length in (20, 300, 1000):
        chosen = choose_forward(model, 2, rows_of(length))
        assert isinstance(chosen, SplitForward), chosen.note
        assert (chosen.packs, chosen.skips) == (True, True), chosen.note


@pytest.mark.parametrize("base_type", BASE_TYPES)
def test_a_shared_start_is_taken(tmp_path: Path, base_type: str) -> None:
    model = adapted(write_gpu_model(tmp_path / "base", "llama", base_type), 1)
    rows = random_rows(6, seed=5, start=24)
    longest = rows.row(int(np.argmax(rows.lengths)))[0].tolist()
    chosen = choose_forward(model, 1, [longest])
    assert choose_start(model, chosen, [rows]) is not None


@pytest.mark.parametrize("base_type", BASE_TYPES)
@pytest.mark.parametrize("fault", planted_faults(), ids=lambda fault: fault.name)
def test_a_planted_fault_is_refused(tmp_path: Path, base_type: str, fault: PlantedFault) -> None:
    model = adapted(write_gpu_model(tmp_path / "base", "llama", base_type), 2)
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)
        chosen = choose_forward(model, 2, rows_of(64))
    found = isinstance(chosen, PlainForward) or not (chosen.packs and chosen.skips)
    assert found, chosen.note


@pytest.mark.parametrize("base_type", BASE_TYPES)
def test_a_training_learns_the_same_twice(tmp_path: Path, base_type: str) -> None:
    """Equal bits are more than a GPU promises."""
    base = write_gpu_model(tmp_path / "base", "llama", base_type)
    one, other = (trained(tmp_path / name, base, **LORA) for name in ("one", "other"))
    assert "as stored" in one["compute"] and "unpadded" in one["fast_path"]
    assert one["final_validation_loss"] == pytest.approx(other["final_validation_loss"], rel=1e-2)
    assert likeness(tmp_path / "one", tmp_path / "other") > 0.98


@pytest.mark.parametrize("name", [name for name, _ in all_checks(cache_home())])
def test_the_doctor_finds_no_failure(name: str) -> None:
    check = guarded(name, dict(all_checks(cache_home()))[name])
    assert check.status != "fail", check


def test_the_step_is_one_graph_for_all_batches_of_a_size(tmp_path: Path) -> None:
    """The compiled gradient has the bits of no other batch: it is computed for each anew."""
    from mlx_ft.doctor.miniature import Step, adapt, miniature

    model = miniature()
    recipe = adapt(model, 1)
    forward = choose_forward(model, 1, rows_of(40))
    step = Step.of(model, recipe, forward, (30, 31))
    losses = {step.take() for _ in range(3)}
    assert len(losses) == 3
    weights = dict(tree_flatten(model.trainable_parameters()))
    assert all(bool(mx.isfinite(array).all().item()) for array in weights.values())
