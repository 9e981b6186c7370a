"""KL divergence and logit differences of models on fixed prompts, in chunks of the vocabulary.

Does: sum, chunk by chunk, divergence, largest difference and most probable tokens of two models at
every position; run models layer by layer or as a whole. Does not: judge (`verify_checks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_ft.data.tokens import group_rows, pad_rows
from mlx_ft.export.layerwise import LayerwiseModel
from mlx_ft.system.console import Progress

Logits = npt.NDArray[np.float32]
# Padded tokens that go through a layer together.
BATCH_TOKENS = 1024
# Logits of one model, and rows of its head, that are computed at a time (bytes).
LOGIT_BYTES = 16 << 20


@dataclass(frozen=True)
class Difference:
    """One model against a reference, over all positions of the prompts.

    largest: largest logit difference over the largest logit, of the worst prompt. divergence: mean
    KL divergence of next-token distributions (nats). flips: share of positions where the most
    probable token differs.
    """

    largest: float
    divergence: float
    flips: float


class _Sums:
    """Running sums over one model's logits, for each position."""

    def __init__(self, positions: int) -> None:
        self.top = np.full(positions, -np.inf, np.float32)
        self.top_token = np.zeros(positions, np.int64)
        # Of exp(logit - top).
        self.sum: npt.NDArray[np.floating[Any]] = np.zeros(positions, np.float64)
        self.largest = np.zeros(positions, np.float32)

    def add(self, logits: Logits, first: int) -> tuple[Logits, npt.NDArray[np.float64]]:
        """Add the logits (N, words) of vocabulary entries from `first` on.

        Returns exp(logits - top), and the factor that rescales sums relative to the old top.
        """
        best = logits.argmax(axis=1)
        value: Logits = logits[np.arange(len(best)), best]
        higher = value > self.top
        top: Logits = np.maximum(self.top, value)
        # The first time there is no old top, and nothing to be rescaled.
        rescale: npt.NDArray[np.float64] = np.exp((self.top - top).astype(np.float64))
        weights: Logits = np.exp(logits - top[:, None])
        self.sum = self.sum * rescale + weights.sum(axis=1)
        self.top_token = np.where(higher, best + first, self.top_token)
        self.top = top
        self.largest = np.maximum(self.largest, np.abs(logits).max(axis=1))
        return weights, rescale

    @property
    def log_sum(self) -> npt.NDArray[np.float64]:
        result: npt.NDArray[np.float64] = self.top + np.log(self.sum)
        return result


class Comparison:
    """Compare models in pairs (reference, other), from logits that are added chunk by chunk.

    prompt_of: the prompt that each position belongs to.
    """

    def __init__(self, prompt_of: npt.NDArray[np.int64], pairs: Sequence[tuple[str, str]]) -> None:
        self._prompt_of, self._pairs = prompt_of, list(pairs)
        positions = len(prompt_of)
        self._models = {name: _Sums(positions) for pair in pairs for name in pair}
        self._crossed = {pair: np.zeros(positions, np.float64) for pair in self._pairs}
        self._apart = {pair: np.zeros(positions, np.float32) for pair in self._pairs}

    def add(self, logits: Mapping[str, Logits], first: int) -> None:
        """Add each model's logits (N, words) of the same vocabulary entries, from `first` on."""
        weights = {name: each.add(logits[name], first) for name, each in self._models.items()}
        for pair in self._pairs:
            reference, other = pair
            apart = logits[reference] - logits[other]
            weight, rescale = weights[reference]
            crossed = np.einsum("nw,nw->n", weight, apart)
            self._crossed[pair] = self._crossed[pair] * rescale + crossed
            self._apart[pair] = np.maximum(self._apart[pair], np.abs(apart).max(axis=1))

    @property
    def prompt_of(self) -> npt.NDArray[np.int64]:
        """The prompt of each position; a prompt's positions are in their order."""
        return self._prompt_of

    def differences(
        self, among: npt.NDArray[np.bool_] | None = None
    ) -> dict[tuple[str, str], Difference]:
        """Return the difference of each pair, at all positions or `among` some.

        The sum over p (log p - log q) is the crossed sum over the sum of p, minus the logarithm of
        p's sum, plus that of q's.
        """
        found = {}
        here = np.ones(len(self._prompt_of), bool) if among is None else among
        for pair in self._pairs:
            one, two = (self._models[name] for name in pair)
            divergence = (self._crossed[pair] / one.sum - one.log_sum + two.log_sum)[here]
            found[pair] = Difference(
                # NumPy's maximum, unlike Python's, keeps NaN.
                largest=float(np.max([self._relative(pair, at) for at in self._prompts(here)])),
                divergence=float(np.maximum(divergence.mean(), 0.0)),
                flips=float((one.top_token != two.top_token)[here].mean()),
            )
        return found

    def _relative(self, pair: tuple[str, str], here: npt.NDArray[np.bool_]) -> np.float32:
        largest = np.maximum(self._models[pair[0]].largest[here].max(), np.float32(1e-9))
        relative: np.float32 = self._apart[pair][here].max() / largest
        return relative

    def _prompts(self, here: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.bool_]]:
        prompts = np.unique(self._prompt_of[here])
        return [here & (self._prompt_of == prompt) for prompt in prompts]


@dataclass(frozen=True)
class _PartOfAll:
    """Progress of one model, reported as a share of the work for all models.

    whole: progress of all models. before: steps done before this model. total: steps of all.
    """

    whole: Progress
    before: int
    total: int

    def update(self, done: float, text: str = "") -> None:
        """Show that `done` steps of this model are done."""
        self.whole.update((self.before + done) / self.total, text)


def compare_layerwise(
    models: Mapping[str, Callable[[], LayerwiseModel]],
    pairs: Sequence[tuple[str, str]],
    prompts: Sequence[Sequence[int]],
    progress: Progress,
) -> Comparison:
    """Compare models that run one layer at a time. Reports the share that is done."""
    groups = [list(group) for group in group_rows(list(map(len, prompts)), BATCH_TOKENS)]
    batches = [mx.array(pad_rows([prompts[index] for index in group])) for group in groups]
    prompt_of = np.concatenate(
        [np.full(len(prompts[index]), index) for group in groups for index in group]
    )
    opened = {name: open_model() for name, open_model in models.items()}
    steps = sum(model.layers + 1 for model in opened.values())
    done = 0
    finals = {}
    for name, model in opened.items():
        states = model.states(batches, _PartOfAll(progress, done, steps))
        finals[name] = _real_positions(states, prompts, groups)
        done += model.layers
        del states
    comparison = Comparison(prompt_of, pairs)
    vocabulary = min(model.vocabulary for model in opened.values())
    width = max(finals[name].shape[1] for name in finals)
    words = max(1, LOGIT_BYTES // (4 * max(len(prompt_of), width)))
    for first in range(0, vocabulary, words):
        end = min(vocabulary, first + words)
        comparison.add(
            {name: _to_numpy(opened[name].logits(finals[name], first, end)) for name in opened},
            first,
        )
        mx.clear_cache()
        progress.update((done + len(opened) * end / vocabulary) / steps)
    return comparison


def _real_positions(
    states: Sequence[mx.array], prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[int]]
) -> mx.array:
    """Return the final states (N, hidden) of all positions that are not padding."""
    real = mx.concatenate(
        [
            state[place, : len(prompts[index])]
            for state, group in zip(states, groups, strict=True)
            for place, index in enumerate(group)
        ]
    )
    mx.eval(real)
    return real


def compare_whole(
    models: Mapping[str, Callable[[], nn.Module]],
    pairs: Sequence[tuple[str, str]],
    prompts: Sequence[Sequence[int]],
    progress: Progress,
) -> Comparison:
    """Compare models that are loaded one after the other, with all their logits in memory.

    Reports the share that is done.
    """
    logits: dict[str, list[Logits]] = {}
    for name, load in models.items():
        model = load()
        logits[name] = prompt_logits(model, prompts)
        del model
        mx.clear_cache()
        progress.update(len(logits) / len(models))
    return compared(logits, pairs)


def differences(
    logits: Mapping[str, Sequence[Logits]], pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Difference]:
    """Return the differences of models with these logits, (T, vocabulary) of each prompt."""
    return compared(logits, pairs).differences()


def compared(
    logits: Mapping[str, Sequence[Logits]], pairs: Sequence[tuple[str, str]]
) -> Comparison:
    """Compare models with these logits, (T, vocabulary) of each prompt."""
    lengths = [len(each) for each in next(iter(logits.values()))]
    prompt_of = np.repeat(np.arange(len(lengths)), lengths)
    comparison = Comparison(prompt_of, pairs)
    comparison.add({name: np.concatenate(each) for name, each in logits.items()}, 0)
    return comparison


def prompt_logits(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[Logits]:
    """Return the logits (T, vocabulary) of each prompt in float32, one prompt at a time."""
    results = []
    for prompt in prompts:
        results.append(np.array(_to_numpy(model(mx.array([list(prompt)]))[0])))
        mx.clear_cache()
    return results


def _to_numpy(logits: mx.array) -> Logits:
    return np.array(logits.astype(mx.float32))
