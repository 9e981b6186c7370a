"""A stage is complete or does not exist, whatever happens while it is written."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_ft.errors import RunError
from mlx_ft.runs import folder as runs_folder
from mlx_ft.runs.clean import find_rubbish
from mlx_ft.runs.folder import (
    MANIFEST,
    Manifest,
    complete_stage,
    is_run,
    read_manifest,
    run_folder,
    seal,
    taken_over,
    update_record,
    verify_files,
    writing_stage,
)
from mlx_ft.runs.listing import run_folders
from mlx_ft.runs.reader import ArtifactReader
from mlx_ft.system.files import (
    canonical_json,
    hash_of,
    read_json,
    read_json_lines,
    replacing,
    require_free_bytes,
    write_json,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def write_stage(run: Path, stage: str = "data", inputs: str = "in", text: str = "rows") -> Manifest:
    with writing_stage(run, stage) as folder:
        (folder / "rows.txt").write_text(text)
        (folder / "deep").mkdir()
        (folder / "deep" / "numbers.bin").write_bytes(bytes(range(200)))
        return seal(folder, stage, inputs, {"rows": 3, "name": "Zwölf"})


def test_a_sealed_stage_is_complete_for_its_inputs_and_no_others(tmp_path: Path) -> None:
    written = write_stage(tmp_path)
    assert complete_stage(tmp_path, "data", "in") == written == read_manifest(tmp_path / "data")
    assert set(written.files) == {"rows.txt", "deep/numbers.bin"}
    assert verify_files(tmp_path / "data") == []
    assert complete_stage(tmp_path, "data", "other") is None
    assert complete_stage(tmp_path, "train", "in") is None
    (tmp_path / "data").rename(tmp_path / "train")
    assert complete_stage(tmp_path, "train", "in") is None, "it says of itself that it is data"


def change_manifest(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a file deleted": lambda f: (f / "rows.txt").unlink(),
    "a deep file deleted": lambda f: (f / "deep" / "numbers.bin").unlink(),
    "a file cut": lambda f: (f / "rows.txt").write_text("row"),
    "a file longer": lambda f: (f / "rows.txt").write_text("rows!"),
    "no manifest": lambda f: (f / MANIFEST).unlink(),
    "an empty manifest": lambda f: (f / MANIFEST).write_text(""),
    "a manifest that is no text": lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"),
    "a manifest nested too deeply": lambda f: (f / MANIFEST).write_text("[" * 100_000),
    "another schema": lambda f: change_manifest(f, schema=runs_folder.SCHEMA + 1),
    "files as a list": lambda f: change_manifest(f, files=["rows.txt"]),
    "a file without facts": lambda f: change_manifest(f, files={"rows.txt": None}),
    "a file without size": lambda f: change_manifest(f, files={"rows.txt": {"sha256": "0"}}),
    "a file without hash": lambda f: change_manifest(f, files={"rows.txt": {"bytes": 4}}),
    "an impossible name": lambda f: change_manifest(f, files={"\0": {"bytes": 0, "sha256": ""}}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_stage_does_not_exist(tmp_path: Path, damage: str) -> None:
    write_stage(tmp_path)
    DAMAGE[damage](tmp_path / "data")
    assert read_manifest(tmp_path / "data") is None
    assert complete_stage(tmp_path, "data", "in") is None
    (fault,) = verify_files(tmp_path / "data")
    assert fault.found == "no valid manifest"


@given(value=JSON)
@settings(max_examples=60)
def test_no_json_at_all_in_a_manifest_is_trusted_or_crashes(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("stage")
    for content in (value, {"schema": 1, "stage": "s", "inputs": "i", "files": value, "info": {}}):
        (folder / MANIFEST).write_text(json.dumps(content))
        manifest = read_manifest(folder)
        assert manifest is None or manifest.files == {}


@given(cut=st.integers(0, 400))
@settings(max_examples=30)
def test_a_torn_manifest_does_not_exist(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    run = tmp_path_factory.mktemp("run")
    write_stage(run)
    path = run / "data" / MANIFEST
    whole = path.read_bytes().rstrip()
    path.write_bytes(whole[:cut])
    assert (read_manifest(run / "data") is None) == (cut < len(whole))


def test_one_flipped_byte_is_found_and_named(tmp_path: Path) -> None:
    write_stage(tmp_path)
    path = tmp_path / "data" / "deep" / "numbers.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert read_manifest(tmp_path / "data") is not None, "sizes alone do not tell"
    (fault,) = verify_files(tmp_path / "data")
    assert fault.where == str(path) and "differs" in fault.found


def test_an_error_leaves_the_old_stage_and_no_new_one(tmp_path: Path) -> None:
    write_stage(tmp_path, text="old")
    with pytest.raises(KeyboardInterrupt), writing_stage(tmp_path, "data") as folder:
        (folder / "rows.txt").write_text("half")
        raise KeyboardInterrupt
    assert complete_stage(tmp_path, "data", "in") is not None
    assert (tmp_path / "data" / "rows.txt").read_text() == "old"
    assert read_manifest(tmp_path / "data.tmp") is None


def test_leftovers_are_removed_unless_they_are_to_be_continued(tmp_path: Path) -> None:
    (tmp_path / "data.tmp").mkdir()
    (tmp_path / "data.tmp" / "left").touch()
    with writing_stage(tmp_path, "data", keep_partial=True) as folder:
        assert (folder / "left").exists()
        seal(folder, "data", "in", {})
    (tmp_path / "data").rename(tmp_path / "data.tmp")
    write_stage(tmp_path)
    manifest = read_manifest(tmp_path / "data")
    assert manifest is not None
    assert set(manifest.files) == {"rows.txt", "deep/numbers.bin"}


def test_what_a_killed_write_left_is_not_part_of_a_sealed_stage(tmp_path: Path) -> None:
    with writing_stage(tmp_path, "data") as folder:
        (folder / "deep").mkdir()
        (folder / "rows.txt").write_text("rows")
        for name in (".rows.txt.4711.tmp", "deep/.numbers.bin.4711.tmp"):
            (folder / name).write_text("half of it")
        written = seal(folder, "data", "in", {})
    assert set(written.files) == {"rows.txt"}
    assert sorted(p.name for p in (tmp_path / "data").rglob("*")) == ["deep", MANIFEST, "rows.txt"]


def test_a_stage_that_was_not_sealed_is_our_own_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not sealed"), writing_stage(tmp_path, "data"):
        pass
    assert not (tmp_path / "data").exists()


WRITER = """
import sys
from pathlib import Path
from mlx_ft.runs.folder import seal, write_json, writing_stage
run = Path(sys.argv[1])
print("ready", flush=True)
number = 0
while True:
    number += 1
    with writing_stage(run, "data") as folder:
        for part in range(3):
            (folder / f"{part}.bin").write_bytes(bytes([number % 256]) * (20_000 + number))
        seal(folder, "data", "in", {"number": number})
    write_json(run / "run.json", {"number": number, "text": "x" * 20_000})
"""


def test_kill_9_leaves_a_whole_stage_or_none(tmp_path: Path) -> None:
    """A real SIGKILL at random moments, while stage and record are replaced again and again."""
    moments = random.Random(20250101)
    found = []
    for _ in range(15):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0.002, 0.08))
        writer.send_signal(signal.SIGKILL)
        assert writer.wait(timeout=30) == -signal.SIGKILL
        writer.stdout.close()
        manifest = complete_stage(tmp_path, "data", "in")
        if manifest is not None:
            assert verify_files(tmp_path / "data") == []
            number = manifest.info["number"]
            for part in range(3):
                content = (tmp_path / "data" / f"{part}.bin").read_bytes()
                assert content == bytes([number % 256]) * (20_000 + number)
        if (tmp_path / "run.json").exists():
            assert len(read_json(tmp_path / "run.json")["text"]) == 20_000
        found.append(manifest is not None)
    assert any(found), "no stage was ever finished, so nothing was shown"


@given(old=JSON, new=JSON)
@settings(max_examples=40)
def test_json_is_replaced_whole(
    tmp_path_factory: pytest.TempPathFactory, old: Any, new: Any
) -> None:
    path = tmp_path_factory.mktemp("json") / "value.json"
    for value in (old, new):
        write_json(path, value)
        assert read_json(path) == value
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]


def test_json_that_cannot_be_written_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"old": True})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"new": [1.0, float("nan")]})
    assert read_json(path) == {"old": True}

    def disk_full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"new": True})
    assert read_json(path) == {"old": True}


@pytest.mark.parametrize("name", [None, "value.part"])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, name: str | None) -> None:
    path, partial = tmp_path / "value", tmp_path / name if name else None
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path, partial) as fresh:
        fresh.write_text("new")
        assert path.read_text() == "old" and (partial is None or fresh == partial)
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path, partial) as fresh:
        fresh.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


ROWS = st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3), max_size=5)


@given(rows=ROWS, data=st.data())
@settings(max_examples=60)
def test_json_lines_survive_a_torn_end(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], data: st.DataObject
) -> None:
    """Cut anywhere, inside a character too: the whole lines before the cut come back."""
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)), label="cut")
    path.write_bytes(whole[:cut])
    ends = [sum(map(len, lines[: n + 1])) for n in range(len(lines))]
    complete = [row for row, end in zip(rows, ends, strict=True) if end - 1 <= cut]
    assert read_json_lines(path) == complete


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028two\u2029three\x85four\x0bfive"}, {"text": "six"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert read_json_lines(path) == rows
    assert read_json_lines(tmp_path / "none.jsonl") == []


@given(value=st.dictionaries(st.text(), JSON, min_size=2, max_size=4))
@settings(max_examples=40)
def test_the_hash_of_a_value_ignores_the_order_of_its_keys(value: dict[str, Any]) -> None:
    turned = dict(reversed(value.items()))
    assert canonical_json(turned) == canonical_json(value)
    assert hash_of(turned) == hash_of(value)
    first = next(iter(value))
    assert hash_of({**value, first: [value[first]]}) != hash_of(value)


def test_a_run_folder_has_a_name_and_can_be_made_twice(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "runs", "quick", "0123456789abcdef")
    assert folder == tmp_path / "runs" / "quick-01234567" == run_folder(
        tmp_path / "runs", "quick", "0123456789abcdef"
    )  # fmt: skip
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["../out", "a/b", "../../etc/x", "/tmp/x", "a/../../x"])
def test_a_run_folder_stays_inside_its_root(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="outside"):
        run_folder(tmp_path / "runs", name, "0123456789")
    assert not (tmp_path / "runs").exists() and list(tmp_path.iterdir()) == []


def test_a_run_folder_is_not_followed_out_of_its_root(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs" / "quick-01234567").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="outside"):
        run_folder(tmp_path / "runs", "quick", "0123456789")


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="cannot be written") as caught:
        run_folder(tmp_path / "runs", "quick", "0123456789")
    assert "--runs" in caught.value.faults[0].fix
    with pytest.raises(RunError, match="cannot be written"):
        run_folder(tmp_path, "x" * 300, "0123456789")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that not even root can write")
def test_a_place_where_even_root_cannot_write_says_so() -> None:
    with pytest.raises(RunError, match="cannot be written"):
        run_folder(Path("/proc"), "quick", "0123456789")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_parent_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(RunError, match="cannot be written"):
            run_folder(tmp_path, "quick", "0123456789")
    finally:
        tmp_path.chmod(0o755)


def test_missing_space_is_said_before_it_is_needed(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_free_bytes(tmp_path, min(free, 1), "the export")
    with pytest.raises(RunError, match=r"the export needs 1,000 TB, .* are free"):
        require_free_bytes(tmp_path, 10**15, "the export")


def test_the_record_grows_and_survives_a_torn_file(tmp_path: Path) -> None:
    created = update_record(tmp_path, status="running", stages={"data": {"seconds": 1.0}})
    update_record(tmp_path, stages={"train": {"seconds": 2.0}})
    record = update_record(tmp_path, status="done", stages={"data": {"seconds": 3.0}})
    assert record == read_json(tmp_path / "run.json")
    assert record["stages"] == {"data": {"seconds": 3.0}, "train": {"seconds": 2.0}}
    assert record["status"] == "done" and record["created"] == created["created"]
    assert record["updated"] >= record["created"]
    (tmp_path / "run.json").write_text('{"status": "do')
    assert update_record(tmp_path, status="running")["stages"] == {}


def test_a_stage_of_the_same_inputs_is_taken_over_whole_or_not_at_all(tmp_path: Path) -> None:
    made, fresh = tmp_path / "made", tmp_path / "fresh"
    fresh.mkdir()
    (tmp_path / "a file").touch()
    with writing_stage(made, "data") as folder:
        (folder / "rows").write_text("rows")
        seal(folder, "data", "inputs", {"rows": 1})
    assert taken_over(fresh, "data", "other inputs") is None and not list(fresh.iterdir())
    assert taken_over(fresh, "data", "inputs") == made
    assert read_manifest(fresh / "data") == read_manifest(made / "data")
    assert not verify_files(fresh / "data")
    third = tmp_path / "third"
    third.mkdir()
    for run in (made, fresh):
        (run / "data" / "rows").write_text("sowr")  # of the same size
    assert taken_over(third, "data", "inputs") is None and not list(third.iterdir())


MANIFEST_OF = '{"schema": 1, "stage": "%s", "inputs": "i", "files": {}, "info": {}}'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("run.json", "{}", True),
        ("run.json", '{"status": "do', True),  # broken, and so to be told
        ("recipe.json", "{}", True),
        ("preflight.json", "{}", True),
        ("data/manifest.json", MANIFEST_OF % "data", True),
        ("train/manifest.json", MANIFEST_OF % "train", True),
        ("export/manifest.json", MANIFEST_OF % "export", True),
        ("eval/manifest.json", '{"stage": "eval", "files": {"gone": {"bytes": 1}}}', True),
        ("train/manifest.json", MANIFEST_OF % "data", False),
        ("train/manifest.json", '{"name": "of something else"}', False),
        ("train/manifest.json", "[]", False),
        ("train/manifest.json", "{", False),
        ("manifest.json", MANIFEST_OF % "train", False),  # a stage's folder, not a run's
        ("train.tmp/manifest.json", MANIFEST_OF % "train", False),
        ("recipe.yaml", "model: m\n", False),
        ("data/train.jsonl", "{}", False),
        ("results.json", "{}", False),  # of `mlx-ft eval`
    ],
)
def test_one_file_that_only_a_run_has_makes_a_run_folder_for_every_reader(
    tmp_path: Path, name: str, content: str, expected: bool
) -> None:
    folder = tmp_path / "some"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(content)
    assert is_run(folder) is expected
    assert run_folders(tmp_path) == ([folder] if expected else [])
    if expected:
        ArtifactReader(folder)
        find_rubbish(tmp_path, [folder], ["stale"], 0)
        return
    for read in (ArtifactReader, lambda run: find_rubbish(tmp_path, [run], ["stale"], 0)):
        with pytest.raises(RunError, match="holds nothing of a run"):
            read(folder)


def test_a_folder_that_is_not_there_or_is_a_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "run.json").mkdir()
    assert not any(is_run(tmp_path / name) for name in ("none", "file", "."))
