"""Keys of a suite's two files: the YAML file and the lines of the JSONL file.

Does: declare them, with the checks within one value. Does not: know the keys of scorers and targets
(`evaluate/scorers/registry.py` lists them), or read files.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from mlx_ft.evaluate.signs import THINKING_TAGS
from mlx_ft.recipe.fields import Section

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,79}$"
Filled = Annotated[str, StringConstraints(min_length=1)]
# Printed in tables, so without control characters (ANSI sequences).
Printable = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,120}$")]


class SuiteFile(Section):
    """The keys of a suite's YAML file."""

    name: str = Field(pattern=NAME, description="Name in tables, gates and file names.")
    description: str = Field("", description="What it asks and what its score means.")
    samples: Filled = Field(description="JSONL file of the samples, beside this file.")
    scorer: dict[str, Any] = Field(description="`name`, one of the scorers, and its keys.")
    max_tokens: int = Field(ge=1, description="Longest answer in tokens; a longer one is cut.")
    enable_thinking: bool = Field(False, description="Ask in thinking mode; must be the recipe's.")
    stop: list[Filled] = Field(
        default_factory=list, description="Texts that end an answer, and are no part of it."
    )
    tags: list[Printable] = Field(default_factory=list, description="Words to find it by.")
    margin: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Loss of the last column against the base that stops a run, where the 95 % "
        "interval of the loss lies beyond it. A gate on the suite's drop takes its place.",
    )

    @model_validator(mode="after")
    def _may_think(self) -> SuiteFile:
        if self.enable_thinking and any(tag in self.stop for tag in THINKING_TAGS):
            raise ValueError("enable_thinking is true, but stop ends every answer that thinks")
        return self


class Message(Section):
    """One chat message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content or tool_calls")
        return self


class SampleLine(Section):
    """The keys of one line of a suite's JSONL file."""

    id: Printable = Field(description="A name that no other sample has.")
    category: Printable = Field("general", description="A row of the table of scores.")
    messages: list[Message] = Field(
        min_length=1,
        description="Conversation up to the answer: `role` (system, user, assistant, tool), "
        "`content`, `tool_calls`, `name`, `tool_call_id`.",
    )
    tools: list[dict[str, Any]] | None = Field(
        None, description="Tools that the prompt declares, as JSON schemas."
    )
    target: dict[str, Any] = Field(description="What the scorer compares with.")
    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="How much it counts in the mean."
    )
    source: Printable | None = Field(
        None,
        description="What it shares with other samples (a passage, a user): they count as one draw "
        "in the intervals.",
    )
    example: Filled | None = Field(
        None, description="A right answer; refused when it does not score 1.0."
    )

    @model_validator(mode="after")
    def _model_speaks_next(self) -> SampleLine:
        if self.messages[-1].role not in ("user", "tool"):
            raise ValueError("the last message must be of the user or of a tool")
        return self
