"""How well does a model expect a given answer? The one number that is not in what it says itself.

Does: the mean loss of an answer after its conversation, through the chat template. Does not:
generate, or score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_ft.chat import RowRefused
from mlx_ft.cpu_math import fast_math
from mlx_ft.errors import DataError, Fault
from mlx_ft.inference import LoadedModel, scalar


def answer_loss(
    loaded: LoadedModel,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    answer: str,
) -> float:
    """Return the mean loss, in nats a token, of `answer` and its stop token after `messages`.

    The tokens are those of the last turn that training on this row would train. Raises DataError when the row cannot
    be rendered.
    """
    conversation = [*messages, {"role": "assistant", "content": answer}]
    try:
        row = loaded.renderer.training_row(conversation, tools, mask_prompt=True)
    except RowRefused as error:
        raise DataError(Fault("perplexity", str(error), "change the reference")) from error
    asked = len(loaded.renderer.prompt_ids(messages, tools))
    judged = [trained and index >= asked for index, trained in enumerate(row.trained)]
    tokens = mx.array([list(row.ids)])
    mask = mx.array([judged[1:]]).astype(mx.float32)
    with fast_math(loaded.model):
        logits = loaded.model(tokens[:, :-1]).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, tokens[:, 1:])
        return scalar((losses * mask).sum() / mask.sum())
