"""The outcome is a line for each check, one JSON document, and part of each run's record."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_ft.cli.main import cli
from mlx_ft.doctor import examine, speed
from mlx_ft.doctor.checks import Check, worst
from mlx_ft.system.cache import CACHE_HOME_VARIABLE
from mlx_ft.system.doctor_result import RESULT_FILE, kept_result
from mlx_ft.system.environment import environment

GOOD = Check("memory", "ok", "16 GB", "", {"memory_bytes": 16})
BAD = Check("gradient", "fail", "far", "do not train", {"relative_difference": float("nan")})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_HOME_VARIABLE, str(tmp_path / "home"))
    return tmp_path / "home"


def of(monkeypatch: pytest.MonkeyPatch, *checks: Check) -> None:
    named = [(check.name, lambda check=check: check) for check in checks]
    monkeypatch.setattr(examine, "all_checks", lambda home: named)


@pytest.mark.parametrize(("checks", "code"), [((GOOD,), 0), ((GOOD, BAD), 1)])
def test_the_exit_code_is_that_of_the_worst(
    home: Path, monkeypatch: pytest.MonkeyPatch, checks: tuple[Check, ...], code: int
) -> None:
    of(monkeypatch, *checks)
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == code
    assert all(check.found in done.stdout and check.advice in done.stdout for check in checks)
    assert "next     " in done.stdout


def test_the_document_is_json_whatever_was_found(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of(monkeypatch, GOOD, BAD)
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    document = json.loads(done.stdout)
    assert document["status"] == "fail" == worst((GOOD, BAD))
    assert [check["name"] for check in document["checks"]] == ["memory", "gradient"]
    assert document["checks"][1]["figures"] == {"relative_difference": None}


def test_the_outcome_stands_in_a_runs_record_until_mlx_is_another(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert environment()["doctor"] is None
    of(monkeypatch, GOOD, BAD)
    CliRunner().invoke(cli, ["doctor"])
    kept = environment()["doctor"]
    assert kept["checks"] == {"memory": "ok", "gradient": "fail"} and not kept["stale"]
    monkeypatch.setattr("importlib.metadata.version", lambda _: "9.9")
    found = kept_result(home)
    assert found is not None and found["stale"]
    (home / RESULT_FILE).write_text("{")
    assert kept_result(home) is None


def test_every_check_is_there_once() -> None:
    names = [name for name, _ in examine.all_checks(Path("nowhere"))]
    assert len(names) == len(set(names)) >= 12


def test_a_builtin_model_that_is_not_there_is_not_measured() -> None:
    check = speed.builtin_pace(None)
    assert check.status == "warn" and "quickstart" in check.advice


@pytest.mark.model
@pytest.mark.slow
def test_steps_are_timed_beside_mlx_lms() -> None:
    """What is fast is not judged here, only that both were measured."""
    check = speed.beside_mlx_lm()
    assert check.status in ("ok", "warn")
    assert all(isinstance(value, (int, float)) and value > 0 for value in check.figures.values())
