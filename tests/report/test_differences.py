"""What is marked differs, what is not is in the other text, and nothing is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_ft.report.differences import marked

TEXTS = st.text(alphabet="ab .\n<é", max_size=60)


@given(TEXTS, TEXTS)
def test_the_pieces_are_the_text(before: str, text: str) -> None:
    pieces = marked(before, text)
    assert "".join(piece for piece, _ in pieces) == text
    assert all(piece for piece, differs in pieces if differs)


@given(TEXTS)
def test_equal_texts_have_no_mark(text: str) -> None:
    assert marked(text, text) == [(text, False)]


def test_only_the_word_that_changed_is_marked() -> None:
    before, text = 'lint(path="src/app.py")', 'lint(path="src/main.py")'
    assert marked(before, text) == [('lint(path="src/', False), ("main", True), ('.py")', False)]


def test_texts_with_little_in_common_are_not_marked_all_over() -> None:
    assert marked("one two three four", "execute_code") == [("execute_code", False)]
