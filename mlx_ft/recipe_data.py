"""What a user can ask for about rows and their rendering: the recipe's `data` and `chat`.

The other sections are in `recipe.py`, which is where all of them are imported from.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from mlx_ft.recipe_values import Conflict, Day, Real, Section, Text, Whole

# The rules of data/lint.py, which says what each looks for.
LintRule = Literal[
    "cut-answers",
    "one-length",
    "copied-questions",
    "constant-answers",
    "duplicates",
    "near-duplicates",
    "contradictions",
    "some-think",
    "template-marks",
    "secrets",
    "mojibake",
    "refusals",
]


class LossWeight(Section):
    """What some of the trained text weighs in the loss."""

    regex: Text = Field(
        description="Which text, as a Python regular expression on the rendered conversation."
    )
    weight: Real = Field(ge=0, description="What each token of it weighs; others weigh 1.")


class DataRecipe(Section):
    """Rows to learn from."""

    path: Text = Field(
        description="Folder with `train.jsonl` and `valid.jsonl` (or `.json`, `.csv`, `.parquet`), "
        "relative to the current folder."
    )
    holdout: Real | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the training rows that are held out for validation, when there is no "
        "file for it; what a row says decides, and rows that are nearly equal stay together.",
    )
    holdout_seed: Whole = Field(0, ge=0, description="Another number holds out other rows.")
    limit: Whole | None = Field(
        None,
        ge=1,
        description="Rows that are used of each split, from its beginning. Null: all of them.",
    )
    replay: Real | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the trained rows that are the base model's own answers to ordinary "
        "prompts, so that it does not forget how to talk; asked for once and kept for later runs.",
    )
    max_seq_length: Whole = Field(2048, ge=8, description="Longest row in tokens.")
    overlong: Literal["drop", "refuse"] = Field(
        "drop", description="What happens to longer rows; nothing is ever cut."
    )
    mask_prompt: bool = Field(
        True, description="Train only what the assistant says (every assistant turn)."
    )
    prompt_weight: Real = Field(
        1.0,
        ge=0,
        description="With mask_prompt false: what tokens outside the assistant's turns weigh.",
    )
    loss_weights: list[LossWeight] = Field(
        default_factory=list,
        description="Text that weighs more or less in the loss, such as `{regex: 'execute_code', "
        "weight: 3}`; where several match, their weights are multiplied.",
    )
    weight_field: Text | None = Field(
        None, description="Key of the rows whose number all weights of a row are multiplied by."
    )

    tool_api: Text | None = Field(
        None,
        description="File with the functions that rows may call: a YAML or JSON list of `{name, "
        "arguments: {path: string, deep: optional boolean}, returns: [valid]}`, or of tools with "
        "JSON schema parameters.",
    )
    lint_off: dict[LintRule, Text] = Field(
        default_factory=dict,
        description="Rules that are not to look at the training rows, each with the reason why: "
        "`{duplicates: 'rows are repeated on purpose'}`.",
    )

    def conflicts(self) -> list[Conflict]:
        """Return what the weights cannot mean."""
        found = []
        for index, rule in enumerate(self.loss_weights):
            try:
                re.compile(rule.regex)
            except re.error as error:
                key = f"data.loss_weights.{index}.regex"
                said = f"{rule.regex!r} is not a regular expression ({error})"
                found.append(Conflict((key,), said, "escape special characters with \\"))
        if self.prompt_weight != 1 and self.mask_prompt:
            keys = ("data.prompt_weight", "data.mask_prompt")
            said = "prompt_weight is given but mask_prompt leaves prompts out of the loss"
            found.append(Conflict(keys, said, "set mask_prompt: false, or remove prompt_weight"))
        return found


class ChatRecipe(Section):
    """How conversations become tokens, in training, evaluation and the exported model alike."""

    enable_thinking: bool = Field(
        False,
        description="Thinking mode of models that have one, pinned for training and evaluation.",
    )
    date: Day = Field(
        "2025-01-01",
        description="The day that templates which print today's date are given.",
    )
