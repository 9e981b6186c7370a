"""One place answers which device computes, and bounds a GPU's memory."""

from typing import Any

import mlx.core as mx
import pytest

from mlx_ft.engine.device import AS_GPU, CACHE_SHARE, configure_backend, memory_limits, on_cpu


def test_the_switch_answers_as_a_gpu_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AS_GPU, raising=False)
    assert on_cpu() == (mx.default_device().type == mx.cpu)
    monkeypatch.setenv(AS_GPU, "1")
    assert not on_cpu()


@pytest.mark.parametrize("working_set", [11_453_251_584, 0])
def test_limits_follow_the_recommended_working_set(
    monkeypatch: pytest.MonkeyPatch, working_set: int
) -> None:
    """A device that recommends nothing keeps MLX's own limits."""
    monkeypatch.setenv(AS_GPU, "1")
    found: dict[str, Any] = {"max_recommended_working_set_size": working_set} if working_set else {}
    monkeypatch.setattr(mx, "device_info", lambda: found)
    limits: dict[str, int] = {}
    for name in ("wired", "memory", "cache"):
        monkeypatch.setattr(mx, f"set_{name}_limit", lambda n, name=name: limits.update({name: n}))
    configure_backend()
    cache = working_set // CACHE_SHARE
    whole = {"wired": working_set, "memory": working_set, "cache": cache}
    assert limits == (whole if working_set else {})
    said = memory_limits()
    assert (said is not None) == bool(working_set)
    assert said is None or ("11.5 GB" in said.words and "1.43 GB" in said.words)
