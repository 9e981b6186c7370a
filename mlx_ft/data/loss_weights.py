"""Per-token loss weights: by position, by text, by row.

Does not: decide which tokens are trained (`model/chat.py`), or apply the weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mlx_ft.data.rows import Row
from mlx_ft.data.tokens import Weights
from mlx_ft.model.chat import ChatRenderer, RowRefused
from mlx_ft.recipe.schema import DataRecipe, LossWeight

Spans = Sequence[tuple[int, int]]


def weighs_anything(data: DataRecipe) -> bool:
    """Say whether a recipe gives any weight at all."""
    return bool(data.loss_weights or data.weight_field or data.prompt_weight != 1)


def token_weights(row: Row, renderer: ChatRenderer, data: DataRecipe, tokens: int) -> Weights:
    """Return the weight of each of a row's `tokens` tokens, float32 [tokens].

    Raises RowRefused for plain text under `data.loss_weights`, and when a row would weigh nothing.
    """
    weights = np.full(tokens, row.weight, np.float32)
    if row.messages is None:
        if data.loss_weights:
            raise RowRefused("plain text cannot be weighed by data.loss_weights")
        return _require_weight(weights)
    if data.prompt_weight != 1:
        spoken = renderer.training_row(row.messages, row.tools, mask_prompt=True).trained
        weights[~np.array(spoken)] *= data.prompt_weight
    if data.loss_weights:
        text, spans = renderer.training_spans(row.messages, row.tools)
        assert len(spans) == tokens
        weights *= span_weights(text, spans, data.loss_weights)
    return _require_weight(weights)


def span_weights(text: str, spans: Spans, rules: Sequence[LossWeight]) -> Weights:
    """Return a factor for each token that lies at `spans` of a text, float32 [tokens].

    A rule's weight goes to every token of which at least one character is in a match of its
    regular expression; weights of several rules are multiplied, of several matches of one are not.
    """
    factors = np.ones(len(spans), np.float32)
    starts, ends = (np.array([span[side] for span in spans]) for side in (0, 1))
    for rule in rules:
        hit = np.zeros(len(spans), bool)
        for match in re.finditer(rule.regex, text):
            if match.end() > match.start():
                hit |= (starts < match.end()) & (ends > match.start())
        factors[hit] *= rule.weight
    return factors


def _require_weight(weights: Weights) -> Weights:
    if not weights.any():
        raise RowRefused("all of its tokens weigh 0 in the loss")
    return weights
