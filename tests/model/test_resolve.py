"""Which model is meant, exactly: resolved, pinned, and refused when it is unsafe or incomplete."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from mlx_ft.errors import ModelError
from mlx_ft.model.builtin import BUILTIN_MODELS
from mlx_ft.model.resolve import HUB_FILES, read_config, resolve_model
from mlx_ft.system.cache import CACHE_HOME_VARIABLE
from mlx_ft.system.console import Console
from tests.conftest import REAL_CACHE_HOME
from tests.support.models import write_tiny_model
from tests.support.narration import HeardConsole

SECRET = "hf_notARealTokenButItLooksLikeOne"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"), layers=4)


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def console() -> HeardConsole:
    return HeardConsole()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(name: str | Path, revision: str | None = None) -> ModelError:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(name), revision, Console())
    assert caught.value.exit_code == 2
    assert all(fault.fix for fault in caught.value.faults)
    return caught.value


def test_a_local_folder_is_what_it_is(folder: Path, console: HeardConsole) -> None:
    model = resolve_model(str(folder), None, console)
    assert (model.source, model.path, model.model_type) == ("local", folder.resolve(), "llama")
    assert model.size_bytes == (folder / "model.safetensors").stat().st_size
    assert model.config == read_config(folder)
    assert console.lines == []


def test_home_and_relative_folders_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    for name in ("~/model", "./model", "model"):
        assert resolve_model(name, None, Console()).path == folder.resolve()


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(content)

    return change


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


INDEX = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}})
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled weights": (only_pickles, "has no safetensors, only pytorch_model.bin"),
    "no weights": (delete("model.safetensors"), "has no weights"),
    "a missing shard": (write("model.safetensors.index.json", INDEX), "model-00002.safetensors"),
    "own code": (lambda folder: edit_config(folder, model_file="evil.py"), "own code .*evil.py"),
    "no tokenizer": (delete("tokenizer.json"), "no tokenizer files"),
    "no config": (delete("config.json"), "config.json: not found"),
    "a torn config": (write("config.json", '{"model_type": "lla'), "not JSON"),
    "a config that is a list": (write("config.json", "[]"), "no model_type"),
    "a config without type": (write("config.json", "{}"), "no model_type"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_unsafe_or_incomplete_is_refused_with_the_reason(folder: Path, case: str) -> None:
    damage, reason = BROKEN[case]
    damage(folder)
    error = refused(folder)
    assert len(error.faults) == 1
    with pytest.raises(ModelError, match=reason):
        raise error


def test_all_faults_of_a_folder_come_at_once(folder: Path) -> None:
    edit_config(folder, model_file="evil.py")
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    assert len(refused(folder).faults) == 3
    (folder / "config.json").unlink()
    assert len(refused(folder).faults) == 3
    for path in folder.iterdir():
        path.unlink()
    assert len(refused(folder).faults) == 3


@pytest.mark.parametrize(
    "name",
    [
        *(
            "no-such-thing",
            "./nowhere",
            "/nowhere/at/all",
            "~/nowhere",
            "~nobody-at-all/x",
            "a/b/c",
        ),
        *("", "x" * 5000, "a\0/b", "-a/b"),
    ],
)
def test_neither_a_folder_nor_a_hub_id(name: str) -> None:
    error = refused(name)
    assert "no such folder, and not a Hub id" in str(error)
    assert "smollm2-135m-instruct" in str(error)


@pytest.mark.parametrize("name", ["a/b--c", "owner/..", "owner/é", "owner/b.git", "a/" + "b" * 200])
def test_what_the_hub_would_not_take_for_a_name_is_refused(name: str) -> None:
    assert "not a Hub id" in str(refused(name))


def test_a_file_is_no_model(folder: Path) -> None:
    refused(folder / "config.json")


def test_the_revision_of_a_folder_follows_its_content(folder: Path) -> None:
    """One byte of the config, the tokenizer or the weights is another model."""

    def identity() -> str:
        return resolve_model(str(folder), None, Console()).identity

    seen = [identity()]
    assert identity() == seen[0]
    for name, old, new in (
        ("config.json", '"rope_theta": 10000.0', '"rope_theta": 20000.0'),
        ("tokenizer.json", '"version": "1.0"', '"version": "1.1"'),
        ("tokenizer_config.json", "4096", "4097"),
    ):
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        seen.append(identity())
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    seen.append(identity())
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    seen.append(identity())
    weights.write_bytes(content + b"\0")
    seen.append(identity())
    assert len(set(seen)) == len(seen)


def test_what_is_recorded_is_json_and_holds_no_secret(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MY_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    info = resolve_model(str(folder), None, Console()).info()
    text = json.dumps(info, allow_nan=False)
    assert json.loads(text) == info
    assert SECRET not in text
    assert set(info) == {
        "name", "path", "source", "revision", "size_bytes", "model_type", "quantization"
    }  # fmt: skip
    assert info["quantization"] == {"group_size": 32, "bits": 4}


def test_nothing_that_could_be_run_is_downloaded() -> None:
    for name in ("modeling.py", "weights.bin", "model.pt", "x.gguf", "setup.sh", "a.pkl"):
        assert not any(Path(name).match(pattern) for pattern in HUB_FILES)


def resolve_offline(hub_home: Path, name: str, revision: str | None) -> "subprocess.Popen[str]":
    """Resolve in a fresh process: huggingface_hub reads its environment when it is imported."""
    code = (
        "import sys\n"
        "from mlx_ft.errors import ModelError\n"
        "from mlx_ft.model.resolve import resolve_model\n"
        "from mlx_ft.system.console import Console\n"
        "try:\n"
        "    model = resolve_model(sys.argv[1], sys.argv[2] or None, Console(sys.stdout))\n"
        "    print(model.source, model.revision, model.path)\n"
        "except ModelError as error:\n"
        "    print('ModelError', error)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, name, revision or ""],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(hub_home)},
        stdout=subprocess.PIPE,
        text=True,
    )


def write_hub_cache(hub_home: Path, model: Path, without: tuple[str, ...] = ()) -> Path:
    """Lay a model out as huggingface_hub's cache has it; return its snapshot folder."""
    place = hub_home / "hub" / "models--owner--name"
    snapshot = place / "snapshots" / COMMIT
    shutil.copytree(model, snapshot, ignore=shutil.ignore_patterns(*without))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_the_hub_offline(tiny: Path, tmp_path: Path) -> None:
    """What is cached is used, by commit without asking; what is not says what to do."""
    cached, partly, empty = (tmp_path / name for name in ("cached", "partly", "empty"))
    snapshot = write_hub_cache(cached, tiny)
    write_hub_cache(partly, tiny, without=("*.safetensors",))
    cases = {
        "commit": resolve_offline(cached, "owner/name", COMMIT),
        "branch": resolve_offline(cached, "owner/name", None),
        "partly": resolve_offline(partly, "owner/name", COMMIT),
        "absent": resolve_offline(empty, "owner/name", None),
    }
    answers = {name: process.communicate(timeout=60)[0] for name, process in cases.items()}
    assert answers["commit"] == f"hub {COMMIT} {snapshot}\n"
    assert answers["branch"].endswith(f"hub {COMMIT} {snapshot}\n")
    assert "looking it up" in answers["partly"], "a partial copy was taken for the model"
    assert "ModelError" in answers["partly"] and "has no weights" in answers["partly"]
    assert "ModelError model owner/name: not a local folder, not cached" in answers["absent"]
    assert "go online once" in answers["absent"]


@pytest.mark.model
def test_the_built_in_model_resolves_offline(
    builtin_model: Path, monkeypatch: pytest.MonkeyPatch, console: HeardConsole
) -> None:
    monkeypatch.setenv(CACHE_HOME_VARIABLE, str(REAL_CACHE_HOME))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    name = "smollm2-135m-instruct"
    model = resolve_model(name, None, console)
    assert model.path == builtin_model
    assert (model.source, model.model_type) == ("builtin", "llama")
    assert model.revision == BUILTIN_MODELS[name].file_sha256
    assert console.lines == []
