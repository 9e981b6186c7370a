"""KL divergence and logit differences of models on fixed prompts, in chunks of the vocabulary.

Does: sum, chunk by chunk, divergence, largest difference and most probable tokens of two models at
every position; run models layer by layer or as a whole. Does not: judge (`verify_checks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_ft.data.tokens import group_rows, pad_rows
from mlx_ft.engine.partial_model import activations_in_float32
from mlx_ft.export.layerwise import LayerwiseModel
from mlx_ft.system.console import Progress

Logits = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
# Padded tokens that go through a layer together.
BATCH_TOKENS = 1024
# Logits of one model, and rows of its head, that are computed at a time (bytes).
LOGIT_BYTES = 16 << 20
# Vocabulary entries whose weights are summed in float32. The divergence of 2**17 is then within
# 2e-7 nats and 2e-6 of its value in float64; summed at once, within 7e-6 nats.
PART_WORDS = 4096


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


@dataclass(frozen=True)
class _Part:
    """One model's logits (N, words) of some vocabulary entries, and what is summed over them.

    weights: exp(logits - top). top, top_token: the largest logit, and its entry within the part.
    sum: of the weights. largest: the largest size of a logit. All but logits and weights are (N).
    """

    logits: mx.array
    weights: mx.array
    top: mx.array
    top_token: mx.array
    sum: mx.array
    largest: mx.array

    @classmethod
    def of(cls, logits: mx.array) -> _Part:
        """Return the part of these logits, not evaluated."""
        logits = logits.astype(mx.float32)
        top = logits.max(axis=1)
        weights = mx.exp(logits - top[:, None])
        return cls(
            logits,
            weights,
            top,
            mx.argmax(logits, axis=1),
            weights.sum(axis=1),
            mx.abs(logits).max(axis=1),
        )

    @property
    def sums(self) -> tuple[mx.array, ...]:
        """What is kept of the part: arrays (N)."""
        return self.top, self.top_token, self.sum, self.largest


class _Sums:
    """Running sums over one model's logits, for each position: in float64, on the host."""

    def __init__(self, positions: int) -> None:
        self.top: Doubles = np.full(positions, -np.inf)
        self.top_token = np.zeros(positions, np.int64)
        # Of exp(logit - top).
        self.sum: Doubles = np.zeros(positions)
        self.largest: Doubles = np.zeros(positions)

    def add(self, part: _Part, first: int) -> tuple[Doubles, Doubles]:
        """Add an evaluated part of the vocabulary, from entry `first` on.

        Returns the factors that make sums relative to the old top, and to the part's, relative to
        the new one.
        """
        value, token = _host(part.top), np.array(part.top_token).astype(np.int64)
        higher = value > self.top
        top: Doubles = np.maximum(self.top, value)
        # The first time there is no old top, and nothing to be rescaled.
        old: Doubles = np.exp(self.top - top)
        new: Doubles = np.exp(value - top)
        self.sum = self.sum * old + _host(part.sum) * new
        self.top_token = np.where(higher, token + first, self.top_token)
        self.top = top
        self.largest = np.maximum(self.largest, _host(part.largest))
        return old, new

    @property
    def log_sum(self) -> Doubles:
        result: Doubles = self.top + np.log(self.sum)
        return result


class Comparison:
    """Compare models in pairs (reference, other), from logits that are added chunk by chunk.

    A chunk is summed by MLX, in float32; sums of chunks are added in float64 on the host, because a
    GPU has no such type. prompt_of: the prompt that each position belongs to.
    """

    def __init__(self, prompt_of: npt.NDArray[np.int64], pairs: Sequence[tuple[str, str]]) -> None:
        self._prompt_of, self._pairs = prompt_of, list(pairs)
        positions = len(prompt_of)
        self._models = {name: _Sums(positions) for pair in pairs for name in pair}
        self._crossed: dict[tuple[str, str], Doubles] = {
            pair: np.zeros(positions) for pair in self._pairs
        }
        self._apart: dict[tuple[str, str], Doubles] = {
            pair: np.zeros(positions) for pair in self._pairs
        }

    def add(self, logits: Mapping[str, mx.array], first: int) -> None:
        """Add each model's logits (N, words) of the same vocabulary entries, from `first` on."""
        parts = {name: _Part.of(logits[name]) for name in self._models}
        crossings = {pair: _crossing(parts[pair[0]], parts[pair[1]]) for pair in self._pairs}
        mx.eval([part.sums for part in parts.values()], list(crossings.values()))
        scales = {name: each.add(parts[name], first) for name, each in self._models.items()}
        for pair, (crossed, apart) in crossings.items():
            old, new = scales[pair[0]]
            sums = _host(crossed)
            self._crossed[pair] = self._crossed[pair] * old + sums * new
            # A maximum may pass over NaN, a sum does not.
            furthest = np.where(np.isnan(sums), np.nan, _host(apart))
            self._apart[pair] = np.maximum(self._apart[pair], furthest)

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

    def _relative(self, pair: tuple[str, str], here: npt.NDArray[np.bool_]) -> float:
        largest = np.maximum(self._models[pair[0]].largest[here].max(), 1e-9)
        return float(self._apart[pair][here].max() / largest)

    def _prompts(self, here: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.bool_]]:
        prompts = np.unique(self._prompt_of[here])
        return [here & (self._prompt_of == prompt) for prompt in prompts]


def _crossing(reference: _Part, other: _Part) -> tuple[mx.array, mx.array]:
    """Return (N): sums of weight times difference of logits, and the largest difference."""
    apart = reference.logits - other.logits
    return (reference.weights * apart).sum(axis=1), mx.abs(apart).max(axis=1)


def _host(sums: mx.array) -> Doubles:
    return np.array(sums).astype(np.float64)


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
    for first, end in _parts(vocabulary, max(len(prompt_of), width)):
        comparison.add(
            {name: opened[name].logits(finals[name], first, end) for name in opened}, first
        )
        mx.clear_cache()
        progress.update((done + len(opened) * end / vocabulary) / steps)
    return comparison


def _parts(vocabulary: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of entries, `width` numbers each, within PART_WORDS and LOGIT_BYTES."""
    words = max(1, min(PART_WORDS, LOGIT_BYTES // (4 * width)))
    for first in range(0, vocabulary, words):
        yield first, min(vocabulary, first + words)


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
    """Compare models that are loaded one after the other; all their logits are kept on the host.

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
    vocabulary = min(each.shape[1] for prompts in logits.values() for each in prompts)
    for first, end in _parts(vocabulary, len(prompt_of)):
        some = {
            name: mx.array(np.concatenate([each[:, first:end] for each in prompts]))
            for name, prompts in logits.items()
        }
        comparison.add(some, first)
        mx.clear_cache()
    return comparison


def prompt_logits(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[Logits]:
    """Return the logits (T, vocabulary) of each prompt in float32, one prompt at a time.

    Weights are as the model holds them, and activations in float32 on every device: in 16 bits,
    rounding on the way would hide a wrong weight, or look like one.
    """
    results = []
    with activations_in_float32(model):
        for prompt in prompts:
            logits = model(mx.array([list(prompt)]))[0].astype(mx.float32)
            results.append(np.array(logits))
            mx.clear_cache()
    return results
