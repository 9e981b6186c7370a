"""Every test has a private home and no network; the versions that matter head the output."""

from importlib import metadata
from pathlib import Path

import pytest

from mlx_ft import BLAS
from mlx_ft.cache import CACHE_HOME_VARIABLE, cache_home

# The user's own cache, looked up before any test hides it: the built-in model is fetched once.
REAL_CACHE_HOME = cache_home()


def pytest_report_header() -> str:
    versions = [f"{name} {metadata.version(name)}" for name in ("mlx", "mlx-lm", "transformers")]
    return ", ".join([*versions, BLAS.name])


@pytest.fixture(autouse=True)
def private_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv(CACHE_HOME_VARIABLE, str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def builtin_model() -> Path:
    from mlx_ft.builtin_models import ensure_builtin

    return ensure_builtin("smollm2-135m-instruct", REAL_CACHE_HOME, print)
