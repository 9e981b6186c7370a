"""What a model has said is found again, whatever tore the file, and only so much is kept."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.evaluate.answer_cache import AnswerCache, answer_key
from mlx_ft.model.chat import ChatRenderer
from tests.support.harnesses import (
    QUESTIONS,
    Columns,
    Scripted,
    evaluate_all,
    fine,
    make_suite,
    renderer_of,
)
from tests.support.tokenizers import write_tiny_tokenizer

MODEL = "a" * 64


@given(
    st.dictionaries(
        st.tuples(st.lists(st.integers(0, 9)).map(tuple), st.integers(1, 9)),
        st.tuples(st.lists(st.integers(0, 99)).map(tuple), st.sampled_from(["stop", "length"])),
    ),
    st.binary(max_size=40),
)
def test_what_was_added_is_there(
    tmp_path_factory: pytest.TempPathFactory,
    said: dict[tuple[tuple[int, ...], int], tuple[tuple[int, ...], str]],
    torn: bytes,
) -> None:
    folder = tmp_path_factory.mktemp("answers")
    cache = AnswerCache(folder, MODEL)
    for number, ((prompt, limit), (ids, reason)) in enumerate(said.items()):
        if number == 1:
            with cache.path.open("ab") as stream:
                stream.write(torn)
        cache.add(answer_key(prompt, limit), ids, reason)
    again = AnswerCache(folder, MODEL)
    assert {key: again.get(answer_key(*key)) for key in said} == said
    assert AnswerCache(folder, "b" * 64).get(answer_key((1,), 1)) is None


def test_the_oldest_models_are_forgotten_first(tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        cache = AnswerCache(tmp_path, name * 64, limit_bytes=3000)
        cache.add(answer_key([number], 8), list(range(200)), "stop")
        os.utime(cache.path, (number, number))
    size = cache.path.stat().st_size
    assert size * 2 < 3000 < size * 3
    cache.prune()
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["b", "c"]


def test_a_disk_that_takes_nothing_loses_only_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = AnswerCache(tmp_path / "file", MODEL)
    cache.add(answer_key([1], 8), [1], "stop")
    cache.prune()
    assert cache.get(answer_key([1], 8)) == ((1,), "stop")


@pytest.fixture
def renderer(tmp_path: Path) -> ChatRenderer:
    return renderer_of(write_tiny_tokenizer(tmp_path / "tokenizer"))


def test_another_run_hears_what_the_base_has_said(renderer: ChatRenderer, tmp_path: Path) -> None:
    suites = [make_suite("chat"), make_suite("talk", max_tokens=4)]
    cache = {"cache_folder": tmp_path / "cache", "reusable": True}
    first = evaluate_all(suites, Columns(renderer), tmp_path / "one", Scripted(fine), **cache)
    columns, script = Columns(renderer), Scripted(fine)
    assert evaluate_all(suites, columns, tmp_path / "two", script, **cache) == first
    assert columns.opened == [] and script.prompts == []
    files = {path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*.jsonl")}
    assert len(files) == 4, "each run's own files hold the lines"
    changed = [make_suite("chat", max_tokens=9)]
    evaluate_all(changed, Columns(renderer), tmp_path / "three", script, **cache)
    assert len(script.prompts) == 2 * len(QUESTIONS), "another limit is another answer"


def test_what_only_one_run_has_is_not_kept(renderer: ChatRenderer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    evaluate_all([make_suite()], Columns(renderer), tmp_path, Scripted(fine), cache_folder=cache)
    assert not cache.exists()
