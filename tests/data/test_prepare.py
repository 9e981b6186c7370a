"""The data stage writes a complete, true folder, or raises one DataError and writes nothing."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_ft.data import prepare
from mlx_ft.data.lint import RULES
from mlx_ft.data.prepare import prepare_data
from mlx_ft.data.sources import data_inputs, read_splits
from mlx_ft.data.tokens import read_split
from mlx_ft.errors import DataError, RunError
from mlx_ft.model.chat import ChatRenderer
from mlx_ft.recipe.schema import DataRecipe
from tests.data.conftest import WriteFile
from tests.support.chats import chat, hostile_lines
from tests.support.narration import HeardConsole, SeenProgress
from tests.support.paths import ROOT

LONG = "the quick brown fox " * 40


@pytest.fixture
def data(write_file: WriteFile, tmp_path: Path) -> DataRecipe:
    write_file([chat(f"question {i}", f"answer {i}", category="talk") for i in range(6)])
    write_file([chat("another", "one")], "valid.jsonl")
    return DataRecipe(path=str(tmp_path), max_seq_length=64)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def faults_of(error: pytest.ExceptionInfo[DataError]) -> list[str]:
    return [str(fault) for fault in error.value.faults]


def test_the_folder_holds_both_splits_and_their_statistics(
    data: DataRecipe, renderer: ChatRenderer, out: Path
) -> None:
    console = HeardConsole()
    summary = prepare_data(data, renderer, out, console, SeenProgress())
    assert {path.name for path in out.iterdir()} == {
        "train.safetensors",
        "valid.safetensors",
        "stats.json",
    }
    stats = json.loads((out / "stats.json").read_text())
    for split, rows in (("train", 6), ("valid", 1)):
        tokens = read_split(out / f"{split}.safetensors")
        source = Path(data.path) / f"{split}.jsonl"
        entry = stats["splits"][split]
        assert len(tokens) == entry["rows"] == summary.splits[split]["rows"] == rows
        assert len(tokens.ids) == entry["tokens"]
        assert int(tokens.trained.sum()) == entry["trained_tokens"]
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        assert entry["sources"] == [{"path": str(source), "sha256": digest}]
    assert any("6 rows" in line for line in console.lines)
    info = summary.info()
    assert json.loads(json.dumps(info)) == info
    assert info["fingerprint"] == renderer.fingerprint()


def test_the_same_files_give_the_same_bytes(
    data: DataRecipe, renderer: ChatRenderer, tmp_path: Path
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        prepare_data(data, renderer, folder, HeardConsole(), SeenProgress())
    for name in ("train.safetensors", "valid.safetensors", "stats.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_inputs_change_with_the_rows_and_only_with_them(
    data: DataRecipe, write_file: WriteFile
) -> None:
    before = data_inputs(data)
    write_file([chat("test", "row")], "test.jsonl")
    assert data_inputs(data) == before
    write_file([chat("another", "two")], "valid.jsonl")
    assert data_inputs(data) != before


def test_faults_of_both_files_come_together(
    data: DataRecipe, renderer: ChatRenderer, out: Path, write_file: WriteFile
) -> None:
    write_file([chat(), b"{"])
    write_file([{"prompt": "x", "completion": ""}], "valid.jsonl")
    with pytest.raises(DataError) as error:
        prepare_data(data, renderer, out, HeardConsole(), SeenProgress())
    first, second = faults_of(error)
    assert "train.jsonl:2: not valid JSON" in first
    assert "valid.jsonl:1: completion is empty" in second
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("missing", "fix"), [("train", "write the training rows"), ("valid", "hold out")]
)
def test_a_missing_file_says_what_to_do(missing: str, fix: str, data: DataRecipe) -> None:
    (Path(data.path) / f"{missing}.jsonl").unlink()
    with pytest.raises(DataError) as error:
        data_inputs(data)
    (fault,) = faults_of(error)
    assert f"{missing}.jsonl: there is no such file - {fix}" in fault


@pytest.mark.parametrize("path", ["no/such/folder", "~nobody-here/data", "a\0b", "{file}"])
def test_a_path_that_is_no_folder_is_a_data_error(path: str, data: DataRecipe) -> None:
    wrong = path.format(file=Path(data.path) / "train.jsonl")
    with pytest.raises(DataError, match=r"data\.path"):
        data_inputs(DataRecipe(path=wrong))


def test_rows_left_out_and_files_not_used_are_said(
    data: DataRecipe, renderer: ChatRenderer, out: Path, write_file: WriteFile
) -> None:
    write_file([chat(), chat(answer=LONG), {"prompt": "x", "completion": "y"}][:2])
    write_file([{"text": "a fox"}], "valid.jsonl")
    write_file([chat()], "test.jsonl")
    console = HeardConsole()
    summary = prepare_data(data, renderer, out, console, SeenProgress())
    assert summary.splits["train"]["dropped_overlong"] == 1
    text = "\n".join(console.lines)
    assert "left out 1 rows longer than 64 tokens (line 2)" in text
    assert "test.jsonl: not used" in text
    assert "valid.jsonl: plain text has no prompt to mask" in text


def test_what_is_being_done_is_told_from_the_first_row_to_the_last_rule(
    data: DataRecipe, renderer: ChatRenderer, out: Path, write_file: WriteFile
) -> None:
    write_file([chat(f"question {number}", f"answer {number}") for number in range(9)])
    write_file([chat("another", "one")], "valid.jsonl")
    told = SeenProgress()
    prepare_data(data, renderer, out, HeardConsole(), told)
    rows, rules = told.seen[:10], told.seen[10:]
    assert [share for share, _ in rows] == [number / 10 for number in range(10)]
    assert rows[-1][1] == "9 of 10 tokenized"
    assert [text for _, text in rules] == [f"looking for {rule.name}" for rule in RULES]
    assert [share for share, _ in rules] == sorted(share for share, _ in rules)


def test_a_split_of_only_long_rows_is_an_error(
    data: DataRecipe, renderer: ChatRenderer, out: Path, write_file: WriteFile
) -> None:
    write_file([chat(answer=LONG)], "valid.jsonl")
    with pytest.raises(DataError, match="all 1 rows are longer than max_seq_length"):
        prepare_data(data, renderer, out, HeardConsole(), SeenProgress())


def test_a_folder_that_cannot_be_written_is_a_run_error(
    data: DataRecipe, renderer: ChatRenderer, out: Path
) -> None:
    shutil.rmtree(out)
    with pytest.raises(RunError):
        prepare_data(data, renderer, out, HeardConsole(), SeenProgress())


def test_the_quickstarts_rows_pass(renderer: ChatRenderer, out: Path) -> None:
    data = DataRecipe(path=str(ROOT / "recipes" / "data" / "code_mode"), max_seq_length=512)
    summary = prepare_data(data, renderer, out, HeardConsole(), SeenProgress())
    assert summary.overlap_rows == 0
    assert summary.splits["train"]["dropped_overlong"] == 0


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(hostile_lines, min_size=1, max_size=3), beside_good_rows=st.booleans())
def test_hostile_rows_end_in_a_data_error_or_a_valid_folder(
    lines: list[bytes], beside_good_rows: bool, renderer: ChatRenderer, tmp_path: Path
) -> None:
    good: list[Any] = [json.dumps(chat()).encode()] if beside_good_rows else []
    (tmp_path / "train.jsonl").write_bytes(b"\n".join([*good, *lines]))
    (tmp_path / "valid.jsonl").write_bytes(json.dumps(chat("another", "one")).encode())
    out = tmp_path / "hostile"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    try:
        prepare_data(DataRecipe(path=str(tmp_path)), renderer, out, HeardConsole(), SeenProgress())
    except DataError as error:
        assert list(out.iterdir()) == []
        str(error).encode()
    else:
        assert len(read_split(out / "train.safetensors")) >= 1


def test_calls_of_what_the_api_has_not_are_told_with_their_lines(
    write_file: WriteFile, renderer: ChatRenderer, tmp_path: Path, out: Path
) -> None:
    code = 'result = validate("a")\nsend(result.valid_component)'
    write_file([chat("a", "b"), chat("check it", code)])
    write_file([chat("c", "sned('x')")], "valid.jsonl")
    api = tmp_path / "api.yaml"
    api.write_text(
        "- {name: validate, arguments: {name: string}, returns: [valid]}\n"
        "- {name: send, arguments: {text: string}}\n"
    )
    recipe = DataRecipe(path=str(tmp_path), max_seq_length=128, tool_api=str(api))
    with pytest.raises(DataError) as caught:
        prepare_data(recipe, renderer, out, HeardConsole(), SeenProgress())
    first, second = faults_of(caught)
    assert "train.jsonl:2: attribute result.valid_component" in first
    assert "did you mean result.valid?" in first
    assert "valid.jsonl:1: function sned" in second and "did you mean send?" in second
    assert list(out.iterdir()) == []
    before = data_inputs(recipe)
    api.write_text("- {name: sned, arguments: {text: string}}\n")
    assert data_inputs(recipe) != before, "another API is another input"


def test_a_list_of_functions_may_be_at_home(
    data: DataRecipe,
    renderer: ChatRenderer,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "api.yaml").write_text("- name: send\n")
    recipe = data.model_copy(update={"tool_api": "~/api.yaml"})
    assert "tool_api" in data_inputs(recipe)["sources"]
    prepare_data(recipe, renderer, out, HeardConsole(), SeenProgress())


def test_rows_that_were_read_are_not_read_again(
    data: DataRecipe, renderer: ChatRenderer, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = read_splits(data)
    monkeypatch.setattr(prepare, "read_splits", lambda data: pytest.fail("it is read again"))
    summary = prepare_data(data, renderer, out, HeardConsole(), SeenProgress(), read)
    assert summary.splits["train"]["rows"] == 6


def test_what_lint_finds_is_in_the_statistics(
    write_file: WriteFile, renderer: ChatRenderer, tmp_path: Path, out: Path
) -> None:
    write_file([chat(f"question {i}", f"answer {i}") for i in range(6)] + [chat("what", "so...")])
    write_file([chat("another", "one...")], "valid.jsonl")
    recipe = DataRecipe(path=str(tmp_path), max_seq_length=64)
    prepare_data(recipe, renderer, out, HeardConsole(), SeenProgress())
    (hit,) = json.loads((out / "stats.json").read_text())["lint"]
    assert (hit["rule"], hit["lines"], hit["rows"]) == ("cut-answers", [7], 7)
    off = recipe.model_copy(update={"lint_off": {"cut-answers": "they trail off on purpose"}})
    prepare_data(off, renderer, out, HeardConsole(), SeenProgress())
    assert json.loads((out / "stats.json").read_text())["lint"] == []
