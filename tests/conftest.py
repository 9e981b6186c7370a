"""Every test has a private home and no network; the versions that matter head the output."""

import shutil
from collections.abc import Iterator
from importlib import metadata
from itertools import count
from pathlib import Path

import pytest
from hypothesis import settings

from mlx_ft import BLAS
from mlx_ft.system.cache import CACHE_HOME_VARIABLE, cache_home
from tests.support.jobs import open_run_of, write_place

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("mlx-ft", deadline=None)
settings.load_profile("mlx-ft")

# The user's own cache, looked up before any test hides it: the built-in model is fetched once.
REAL_CACHE_HOME = cache_home()


def pytest_report_header() -> str:
    versions = [f"{name} {metadata.version(name)}" for name in ("mlx", "mlx-lm", "transformers")]
    return ", ".join([*versions, BLAS.name])


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """New folders, one a test; pytest would look through all of its own for each."""
    root, numbers = tmp_path_factory.mktemp("homes"), count()

    def made() -> Iterator[Path]:
        for number in numbers:
            folder = root / str(number)
            folder.mkdir()
            yield folder

    return made()


@pytest.fixture(autouse=True)
def private_home(monkeypatch: pytest.MonkeyPatch, homes: Iterator[Path]) -> None:
    monkeypatch.setenv(CACHE_HOME_VARIABLE, str(next(homes)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def builtin_model() -> Path:
    from mlx_ft.model.builtin import ensure_builtin
    from mlx_ft.system.console import Console

    return ensure_builtin("smollm2-135m-instruct", REAL_CACHE_HOME, Console())


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place whose recipe has been run to the end; only to be looked at."""
    from mlx_ft.pipeline import run_pipeline

    folder = tmp_path_factory.mktemp("finished")
    write_place(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv(CACHE_HOME_VARIABLE, str(tmp_path_factory.mktemp("home")))
        run_pipeline(open_run_of(folder))
    return folder


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a place whose recipe has been run to the end; it is the current folder."""
    shutil.copytree(finished_once, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def finished_run(finished: Path) -> Path:
    """The run folder in such a copy."""
    (run,) = (finished / "runs").iterdir()
    return run
