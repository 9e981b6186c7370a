"""The closed list of scorers: name -> keys and rule. The keys name the class of the target.

To add a scorer, change two files. Write three classes together in one scorer file, old or new:
- `XTarget`, a Section with the keys of a sample's target;
- `XKeys`, a ScorerKeys with the suite's keys, `target`, `build` and, if needed, `target_fault`;
- `X`, a Scorer, whose docstring is the rule as the reference prints it.
Then add one entry to SCORERS below. Reading suites, any_of and all_of, and the reference's table
follow from the list. A new kind of failure also goes into FAILURES in `protocol.py`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from mlx_ft.evaluate.scorers import combined, instructions, structured, text, tool_calls
from mlx_ft.evaluate.scorers.keys import ScorerKeys
from mlx_ft.evaluate.scorers.protocol import Scorer
from mlx_ft.recipe.fields import Section


class Entry(NamedTuple):
    """One scorer of the list: the class of its keys, and the class that judges."""

    keys: type[ScorerKeys]
    rule: type[Scorer]

    @property
    def target(self) -> type[Section]:
        """The class that reads a sample's target."""
        return self.keys.target


SCORERS: Mapping[str, Entry] = {
    "wrapped_call": Entry(tool_calls.WrappedCallKeys, tool_calls.WrappedCall),
    "tool_call": Entry(tool_calls.ToolCallKeys, tool_calls.ToolCall),
    "json": Entry(structured.JsonKeys, structured.Json),
    "instructions": Entry(instructions.InstructionsKeys, instructions.Instructions),
    "talk": Entry(text.TalkKeys, text.Talk),
    "exact": Entry(text.ExactKeys, text.Exact),
    "contains": Entry(text.ContainsKeys, text.Contains),
    "regex": Entry(text.RegexKeys, text.Regex),
    "numeric": Entry(text.NumericKeys, text.Numeric),
    "choice": Entry(text.ChoiceKeys, text.Choice),
    "similarity": Entry(text.SimilarityKeys, text.Similarity),
    "perplexity": Entry(text.PerplexityKeys, text.Perplexity),
    "any_of": Entry(combined.AnyOfKeys, combined.AnyOf),
    "all_of": Entry(combined.AllOfKeys, combined.AllOf),
}
# The type of an item of any_of and all_of: the keys of any scorer here, chosen by `name`.
_one_of_them: Any = functools.reduce(operator.or_, (entry.keys for entry in SCORERS.values()))
for _keys in (combined.AnyOfKeys, combined.AllOfKeys):
    _keys.model_rebuild(
        _types_namespace={"ListedKeys": Annotated[_one_of_them, Field(discriminator="name")]}
    )
