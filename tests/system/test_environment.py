"""What a result was made with is plain, complete and free of secrets."""

import json
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from mlx_ft import BLAS, __version__
from mlx_ft.system import environment

SECRET = "hf_notARealTokenButItLooksLikeOne"


def test_the_facts_are_json_and_true() -> None:
    facts = environment.environment()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["mlx_ft"] == __version__
    for package in ("mlx", "mlx-lm", "transformers", "numpy", "huggingface_hub"):
        assert facts[package.replace("-", "_")] == metadata.version(package)
    assert facts["python"] == platform.python_version()
    assert facts["blas"] == BLAS.name
    assert facts["cores"] >= 1 and facts["memory_bytes"] > 1e8


def test_no_variable_of_the_user_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allow-list: a planted token is nowhere, and no key is there that nobody decided on."""
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "GIT_AUTHOR_NAME", "USER"):
        monkeypatch.setenv(name, SECRET)
    facts = environment.environment()
    assert SECRET not in json.dumps(facts)
    assert set(facts) == {
        *("mlx_ft", "mlx", "mlx_lm", "transformers", "numpy", "huggingface_hub", "python"),
        *("platform", "machine", "cores", "memory_bytes", "blas", "device", "doctor"),
        *("commit", "dirty"),
    }


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("mlx", "no-such-package"))
    assert environment.environment()["no_such_package"] is None


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the package believe that its source lies in `tmp_path/source`."""
    package = tmp_path / "source" / "mlx_ft" / "system"
    package.mkdir(parents=True)
    (package / "environment.py").write_text("# the source")
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    return tmp_path / "source"


def test_commit_and_changes_are_those_of_the_source(source: Path) -> None:
    git(source, "init", "--quiet")
    git(source, "add", ".")
    git(source, "commit", "--quiet", "--message", "first")
    facts = environment.environment()
    assert facts["commit"] == git(source, "rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", facts["commit"])
    assert facts["dirty"] is False
    (source / "mlx_ft" / "system" / "environment.py").write_text("# changed")
    assert environment.environment()["dirty"] is True


def test_outside_a_checkout_there_is_no_commit(source: Path) -> None:
    """Also inside somebody else's checkout: an installed package is not part of it."""
    git(source.parent, "init", "--quiet")
    facts = environment.environment()
    assert facts["commit"] is None and facts["dirty"] is None


def test_without_git_there_is_no_commit(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(source, "init", "--quiet")
    monkeypatch.setenv("PATH", "")
    facts = environment.environment()
    assert facts["commit"] is None and facts["dirty"] is None
