"""Parse untrusted Python without running it, and measure how deep its brackets are.

Does not: set a limit, or look for calls.
"""

from __future__ import annotations

import ast
import re
import warnings


def parse_python(source: str) -> ast.Module | None:
    """Return the tree of a text, or None when it is not Python."""
    try:
        with warnings.catch_warnings():
            # A path such as "src\d" is no reason to warn whoever reads the result.
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def open_brackets(text: str) -> int:
    """Return how deep brackets are nested at most, those in strings too."""
    depth = deepest = 0
    for bracket in re.findall(r"[()\[\]{}]", text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest
