"""The `data` and `chat` sections of a recipe. Import them from `schema.py`."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from mlx_ft.recipe.cli_defaults import DEFAULT_DATE
from mlx_ft.recipe.fields import Conflict, Day, Real, Section, Text, Whole

HUB_PREFIX = "hf:"
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
# What a row can hold, by the names that its forms have for it (data/formats.py).
RowKey = Literal[
    "messages",
    "conversations",
    "tools",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "text",
    "category",
]


class RowFilter(Section):
    """Which rows are used, by what a key of theirs says."""

    field: Text = Field(description="Key of the rows, such as a score of their quality.")
    at_least: Real | None = Field(None, description="Least number; rows below it are left out.")
    at_most: Real | None = Field(None, description="Greatest number; rows above it are left out.")
    one_of: list[Text] | None = Field(
        None, min_length=1, description="Texts, one of which it must be; other rows are left out."
    )

    def conflicts(self) -> list[Conflict]:
        """Return a conflict when there is nothing to filter by."""
        if self.at_least is None and self.at_most is None and self.one_of is None:
            fix = "give at_least, at_most or one_of"
            return [Conflict(("data.keep",), f"the filter of {self.field} lets all pass", fix)]
        return []


class HubRows(Section):
    """Which rows of a dataset of the Hub, for a `data.path` that begins with `hf:`."""

    config: Text | None = Field(None, description="Configuration of the dataset, if it has some.")
    revision: Text | None = Field(None, description="Branch, tag or commit of the dataset.")
    train_split: Text = Field(
        "train", description="Split to train on, such as `train` or `train[:5000]`."
    )
    valid_split: Text | None = Field(
        None, description="Split to validate on, such as `validation`; or give data.holdout."
    )


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
        "relative to the current folder; or `hf:org/name`, a dataset of the Hub, which is fetched "
        "once and kept (needs the extra `hf`)."
    )
    hf: HubRows = Field(default_factory=HubRows, description="Which rows of a dataset of the Hub.")
    fields: dict[RowKey, Text] = Field(
        default_factory=dict,
        description="Where a row's parts are, when they have other names: `{prompt: question, "
        "completion: answer}`.",
    )
    keep: list[RowFilter] = Field(
        default_factory=list,
        description="Rows that are used, by keys of theirs: `[{field: quality, at_least: 3}]`; a "
        "row must pass all of them.",
    )
    drop: list[LintRule] = Field(
        default_factory=list,
        description="Rules of the lint whose rows are left out, in both splits, instead of being "
        "reported: `[duplicates, cut-answers]`.",
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
    order: Literal["shuffled", "file", "length"] = Field(
        "shuffled",
        description="Order in which rows are trained, in every epoch. shuffled: another one in "
        "each epoch; file: as they are written; length: short ones first.",
    )
    order_field: Text | None = Field(
        None,
        description="Key of the rows that orders them instead, such as a difficulty: low numbers, "
        "or texts early in the alphabet, first.",
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

    @property
    def from_hub(self) -> bool:
        """Whether the rows are a dataset of the Hub."""
        return self.path.startswith(HUB_PREFIX)

    @property
    def in_order(self) -> bool:
        """Whether rows are trained in an order of their own instead of shuffled."""
        return self.order != "shuffled" or self.order_field is not None

    def conflicts(self) -> list[Conflict]:
        """Return conflicts of weights and order, and rows of the Hub without a source."""
        found = []
        if self.order_field is not None and self.order != "shuffled":
            keys = ("data.order_field", "data.order")
            found.append(Conflict(keys, "order and order_field are both given", "keep one"))
        if self.from_hub and (self.hf.valid_split is None) == (self.holdout is None):
            places = ("data.path", "data.hf.valid_split", "data.holdout")
            said = "rows to validate on are given twice"
            if self.holdout is None:
                said = "there are no rows to validate on"
            fix = "give one of data.hf.valid_split and data.holdout"
            found.append(Conflict(places, said, fix))
        if not self.from_hub and self.hf != HubRows():
            keys = ("data.hf", "data.path")
            found.append(
                Conflict(keys, "hf is given but path is a folder", "write path: hf:org/name")
            )
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
        DEFAULT_DATE,
        description="The day that templates which print today's date are given.",
    )
