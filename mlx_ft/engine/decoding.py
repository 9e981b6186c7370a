"""Batched prompt reading and greedy decoding, from token ids to token ids.

Does: read prompts in groups of similar length, shared beginnings once. Fill the place of an ended
answer with the next prompt. End an answer that goes in circles.
Does not: know text, templates or files, or sample. Each prompt is answered as if it were alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_ft.engine.cpu_kernels import fast_math
from mlx_ft.engine.device import on_cpu
from mlx_ft.engine.shared_prompts import Start, shared_starts
from mlx_ft.text.repetition import goes_in_circles

# Tokens of one prompt that are read at a time, as mlx-lm has it, and of all prompts together.
READ_TOKENS = 2048
READ_TOKENS_TOGETHER = 8192
# Prompts join when this share of the places is free: each time, all that has been read is copied.
JOIN_SHARE = 8
# Steps between looks for a loop, which takes Python as long as a model takes for a token.
LOOK_EVERY_TOKENS = 16

# mlx-lm's layers for these take the masks of prompts (B, 1, T, S) for masks of groups of heads.
ONE_AT_A_TIME = frozenset({"gemma2", "phi3small"})

Cache = list[Any]
T = TypeVar("T")
# Called as each prompt is done: with its number, and what came of it.
OnDone = Callable[[int, T], None]


@dataclass(frozen=True)
class Decoded:
    """The tokens of an answer, and why it ended.

    ids: without the stop token.
    finish_reason: "stop" (a stop token), "length" (max_tokens reached), or "loop". In a loop the
        tokens have repeated for so long that they would never end (`text/repetition.py`).
    """

    ids: tuple[int, ...]
    finish_reason: str


def prompts_together(model: nn.Module, batch_size: int) -> int:
    """Return how many prompts of a batch the model can take at a time."""
    kind = type(model).__module__.rsplit(".", 1)[-1]
    return 1 if kind in ONE_AT_A_TIME else batch_size


class Reader:
    """Reads prompts into caches; shared beginnings are read once.

    A beginning is shared only where every layer keeps plain keys and values. Windows and recurrent
    states are read whole, prompt by prompt.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
        for prompt in prompts:
            given: object = prompt  # whatever the annotation says
            if isinstance(given, str | bytes):
                raise TypeError("a chat model is prompted with ids of its template, not with text")
        self.model = model
        self.prompts = prompts
        plain = all(type(each) is KVCache for each in make_prompt_cache(model))
        self._starts: tuple[Start, ...] = ()
        self._own: tuple[int | None, ...] = (None,) * len(prompts)
        if plain:
            self._starts, self._own = shared_starts(prompts)
        self._caches: dict[int, Cache] = {}

    def order(self) -> list[int]:
        """Return the prompts' numbers, those that share a start together, shorter ones first."""

        def place(index: int) -> tuple[int, int, int]:
            own = self._own[index]
            return (-1 if own is None else own, len(self.prompts[index]), index)

        return sorted(range(len(self.prompts)), key=place)

    def read(self, indices: Sequence[int]) -> Cache:
        """Return one cache that has these prompts read, in this order, all but their last token."""
        starts = [self._start_cache(self._own[index]) for index in indices]
        skipped = [_read_length(start) for start in starts]
        cache = [type(layers[0]).merge(list(layers)) for layers in zip(*starts, strict=True)]
        rests = [
            list(self.prompts[index][done:-1]) for index, done in zip(indices, skipped, strict=True)
        ]
        self._advance(cache, rests)
        return cache

    def _start_cache(self, number: int | None) -> Cache:
        """Return the cache of a start (of nothing for None); callers must not change it."""
        if number is None:
            empty: Cache = make_prompt_cache(self.model)
            return empty
        if number not in self._caches:
            start = self._starts[number]
            parent = self._start_cache(start.parent)
            cache = [type(each).merge([each]) for each in parent]
            self._advance(cache, [list(start.ids[_read_length(parent) :])])
            self._caches[number] = [each.extract(0) for each in cache]
            mx.eval([each.state for each in self._caches[number]])
        return self._caches[number]

    def _advance(self, cache: Cache, rows: Sequence[list[int]]) -> None:
        """Read rows of ids, padded at their right, into a cache that has one sequence for each."""
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        if longest == 0:
            return
        padding = [longest - length for length in lengths]
        if any(padding):
            for each in cache:
                each.prepare(lengths=lengths, right_padding=padding)
        ids = mx.array([row + [0] * more for row, more in zip(rows, padding, strict=True)])
        for begin in range(0, longest, READ_TOKENS):
            # What a prompt would say is never computed: nobody evaluates it.
            self.model(ids[:, begin : begin + READ_TOKENS], cache=cache)
            mx.eval([each.state for each in cache])
        if any(padding):
            for each in cache:
                each.finalize()
            mx.eval([each.state for each in cache])
        mx.clear_cache()


def _read_length(cache: Cache) -> int:
    return int(cache[0].size()) if type(cache[0]) is KVCache else 0


@dataclass
class _Request:
    """A prompt that is being answered; `begun` once its last token was read."""

    index: int
    max_tokens: int
    ids: list[int] = field(default_factory=list)
    begun: bool = False


class _Batch:
    """Requests that are answered together, a token each at a time.

    tokens: the next ones to be read, one a request: an answer's newest, or the last of its prompt.
    ahead: the next step is begun before this one's tokens are looked at. On a GPU it then never
        waits for Python. On a CPU that would only compute steps of answers that have ended.
    """

    def __init__(self, model: nn.Module, stop_ids: frozenset[int]) -> None:
        self.model = model
        self.stop_ids = stop_ids
        self.ahead = not on_cpu()
        self.requests: list[_Request] = []
        self.cache: Cache = []
        self.tokens = mx.array([], dtype=mx.uint32)

    def join(self, requests: Sequence[_Request], cache: Cache, last: Sequence[int]) -> None:
        """Add requests whose prompts are read in `cache`, but for the `last` token of each."""
        if self.requests:
            for mine, new in zip(self.cache, cache, strict=True):
                mine.extend(new)
        else:
            self.cache = cache
        self.tokens = mx.concatenate([self.tokens, mx.array(list(last), dtype=mx.uint32)])
        self.requests += requests

    def step(self) -> list[tuple[_Request, str]]:
        """Generate a token of each; return those whose answers have ended, with the reason."""
        following = self._following() if self.ahead else None
        ended: list[tuple[_Request, str]] = []
        going: list[int] = []
        values: Any = self.tokens.tolist()
        for place, (request, token) in enumerate(zip(self.requests, values, strict=True)):
            reason = self._take(request, int(token))
            if reason is None:
                going.append(place)
            else:
                ended.append((request, reason))
        if following is not None:
            self.tokens = following
        if ended:
            self._keep(going)
        if following is None and self.requests:
            self.tokens = self._following()
        return ended

    def _following(self) -> mx.array:
        logits = self.model(self.tokens[:, None], cache=self.cache)
        tokens = mx.argmax(logits[:, -1, :], axis=-1)
        mx.async_eval(tokens)  # type: ignore[no-untyped-call]  # mlx has no types for it
        return tokens

    def _take(self, request: _Request, token: int) -> str | None:
        """Add a token to its answer; return why that is over, or None."""
        if not request.begun:
            request.begun = True
            return None
        if token in self.stop_ids:
            return "stop"
        request.ids.append(token)
        if len(request.ids) >= request.max_tokens:
            return "length"
        if len(request.ids) % LOOK_EVERY_TOKENS == 0 and goes_in_circles(request.ids):
            return "loop"
        return None

    def _keep(self, places: list[int]) -> None:
        self.requests = [self.requests[place] for place in places]
        self.tokens = self.tokens[mx.array(places)] if places else mx.array([], dtype=mx.uint32)
        if not places:
            self.cache = []
        for each in self.cache:
            each.filter(places)


def answer_prompts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Iterable[int],
    max_tokens: Sequence[int],
    batch_size: int,
    on_done: OnDone[Decoded],
) -> None:
    """Answer prompts of token ids greedily, `batch_size` at a time, if the model can.

    max_tokens: the longest answer to each prompt.
    on_done: called as each answer ends, in no fixed order.
    """
    if not prompts:
        return
    steps, batch_size = 0, prompts_together(model, batch_size)
    with fast_math(model), wired_limit(model, [generation_stream]), mx.stream(generation_stream):
        reader, batch = Reader(model, prompts), _Batch(model, frozenset(stop_ids))
        waiting = deque(reader.order())
        while waiting or batch.requests:
            free = batch_size - len(batch.requests)
            joining = min(free, len(waiting))
            if joining and (joining * JOIN_SHARE >= batch_size or joining == len(waiting)):
                indices = _next_group(waiting, prompts, joining)
                requests = [_Request(index, max_tokens[index]) for index in indices]
                batch.join(requests, reader.read(indices), [prompts[i][-1] for i in indices])
                continue
            for request, reason in batch.step():
                on_done(request.index, Decoded(tuple(request.ids), reason))
            steps += 1
            if steps % 512 == 0:
                mx.clear_cache()


def _next_group(waiting: deque[int], prompts: Sequence[Sequence[int]], most: int) -> list[int]:
    """Take the next prompts that are read together: one at least, and of similar length."""
    group = [waiting.popleft()]
    while waiting and len(group) < most:
        longest = max(len(prompts[index]) for index in (*group, waiting[0]))
        if longest * (len(group) + 1) > READ_TOKENS_TOGETHER:
            break
        group.append(waiting.popleft())
    return group
