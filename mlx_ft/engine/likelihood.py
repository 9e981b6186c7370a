"""Log-probabilities of given answers, many prompts together.

Does not: generate or render.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, wired_limit

from mlx_ft.engine.cpu_kernels import fast_math
from mlx_ft.engine.decoding import OnDone, Reader, prompts_together
from mlx_ft.engine.load import LoadedModel

# Positions whose logits are held at a time, of all answers together.
POSITIONS_TOGETHER = 1024


@dataclass(frozen=True)
class Likelihood:
    """How likely a model holds an answer.

    log_probabilities: of each token (natural logarithm).
    greedy: each token is the one that greedy decoding would choose there.
    """

    log_probabilities: tuple[float, ...]
    greedy: bool

    @property
    def loss(self) -> float:
        """The mean loss in nats a token."""
        return -sum(self.log_probabilities) / len(self.log_probabilities)


def likelihoods(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    on_done: OnDone[Likelihood] | None = None,
) -> list[Likelihood]:
    """Return how likely each answer is after its prompt, `batch_size` at a time.

    Prompts and answers are token ids; none may be empty. Shared beginnings of prompts are read
    once.
    """
    assert all(prompts) and all(answers), "an empty prompt or answer has no likelihood"
    results: dict[int, Likelihood] = {}
    model, batch_size = loaded.model, prompts_together(loaded.model, batch_size)
    with fast_math(model), wired_limit(model, [generation_stream]), mx.stream(generation_stream):
        reader = Reader(model, prompts)
        order = reader.order()
        while order:
            group = _group(order, prompts, answers, batch_size)
            order = order[len(group) :]
            for index, found in zip(group, _read(model, reader, group, answers), strict=True):
                results[index] = found
                if on_done is not None:
                    on_done(index, found)
    return [results[index] for index in range(len(prompts))]


def _group(
    order: Sequence[int],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    batch_size: int,
) -> list[int]:
    group: list[int] = []
    for index in order[:batch_size]:
        longest = max(len(answers[each]) for each in (*group, index))
        if group and longest * (len(group) + 1) > POSITIONS_TOGETHER:
            break
        group.append(index)
    return group


def _read(
    model: nn.Module, reader: Reader, group: Sequence[int], answers: Sequence[Sequence[int]]
) -> list[Likelihood]:
    """Return the likelihoods of a group's answers: logits only where an answer has a token."""
    cache = reader.read(group)
    longest = max(len(answers[index]) for index in group)
    inputs, targets = [], []
    for index in group:
        answer = list(answers[index])
        padding = [0] * (longest - len(answer))
        inputs.append([reader.prompts[index][-1], *answer[:-1], *padding])
        targets.append([*answer, *padding])
    logits = model(mx.array(inputs), cache=cache).astype(mx.float32)
    wanted = mx.array(targets)[..., None]
    chosen = mx.take_along_axis(logits, wanted, axis=-1)[..., 0]
    log_probabilities = chosen - mx.logsumexp(logits, axis=-1)
    likeliest = mx.argmax(logits, axis=-1)
    mx.eval(log_probabilities, likeliest)
    values: Any = log_probabilities.tolist()
    best: Any = likeliest.tolist()
    mx.clear_cache()
    return [
        Likelihood(
            tuple(row[: len(answers[index])]),
            said[: len(answers[index])] == list(answers[index]),
        )
        for index, row, said in zip(group, values, best, strict=True)
    ]
