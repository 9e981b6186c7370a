"""Split forward pass: frozen prefix, trained top, vocabulary head.

Does: split any mlx-lm model whose forward allows it, without touching its code; prove on real rows
that the parts together give the plain model's logits; else fall back to the plain forward, with a
note. Does not: train, or select the trained weights.

Why: layers below the adapters never change their output for a row, so it is computed once; and
logits are only worth computing where a token is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_ft.engine.device import on_cpu
from mlx_ft.engine.load import read_lazily
from mlx_ft.engine.partial_model import (
    EQUAL_TOLERANCE,
    SIXTEEN_BITS,
    Given,
    Part,
    relative_difference,
    same_shape_tolerance,
)
from mlx_ft.system.gpu_errors import device_failure
from mlx_ft.train.numerics.last_layer import only_at, parts_of, worthwhile
from mlx_ft.train.numerics.packed_places import at_the_end, places_of
from mlx_ft.train.numerics.packing import Layout, Packing, packed
from mlx_ft.train.numerics.recompute import (
    checkpointed,
    keep_inputs_of_gates,
    recompute_cheap_inputs,
)
from mlx_ft.train.numerics.short_attention import attention_with_gradient

# Logits of a long row would take more memory than the training itself.
PROOF_LOGIT_TOKENS = 64


@dataclass(frozen=True)
class ForwardChoice:
    """The forward pass that was chosen.

    name: split, or plain.
    layers, frozen_layers: of the model, and those that are computed once a row.
    packs: rows go through behind each other, unpadded.
    skips: the last layer skips positions whose next token is not trained.
    relative_difference, tolerance: of the split from the plain one, where it was measured.
    reason: why it is the plain one, else empty.
    """

    name: Literal["split", "plain"]
    layers: int
    frozen_layers: int = 0
    packs: bool = False
    skips: bool = False
    relative_difference: float | None = None
    tolerance: float | None = None
    reason: str = ""


class Forward(Protocol):
    """The three parts, as the loop uses them. B rows, T tokens, N trained positions."""

    note: str
    choice: ForwardChoice
    frozen_layers: int
    head_is_frozen: bool
    frozen_released: bool
    packs: bool
    dtype: mx.Dtype | None  # that its layers compute in, where it was seen

    def prefix(self, ids: mx.array) -> mx.array:
        """Return the frozen part's output for ids (B, T)."""

    def evaluate(self, *arrays: Any) -> None:
        """Evaluate arrays that were computed with the frozen part."""

    def top(
        self,
        ids: mx.array,
        prefix: mx.array,
        packing: Layout | None = None,
        wanted: mx.array | None = None,
    ) -> mx.array:
        """Return final hidden states (B, T, hidden) from ids (B, T) and their prefix.

        packing: layout of packed rows, with B = 1; only for a forward that `packs`.
        wanted: positions (N) of the flattened (B, T) that must be right; others may be anything
            finite.
        """

    def head(self, hidden: mx.array) -> mx.array:
        """Return logits (N, vocabulary) of hidden states (N, hidden)."""

    def release_frozen(self) -> None:
        """Release the frozen layers' weights; `prefix` must not be called any more."""

    def restore_frozen(self, layers: Sequence[nn.Module]) -> None:
        """Restore the frozen layers' weights from layers that have them."""


class SplitForward:
    """The split of models like mlx-lm's Llama: `model.model.{embed_tokens, layers, norm}`.

    Each part is the whole inner model with stand-ins for the layers of the other part. Code that
    depends on a layer's number, or runs before the first layer, is then unchanged.

    weights: the model's folder, to stream frozen layers from (None: they stay in memory). Before a
        graph is evaluated, its layers are given other arrays, so that it alone holds the old ones.
        Each array is then read right before its first use, and released after its last.
    recompute_inputs: adapters keep no inputs that are cheap to compute.
    """

    def __init__(
        self,
        model: nn.Module,
        frozen_layers: int,
        grad_checkpoint: bool = False,
        weights: Path | None = None,
        recompute_inputs: bool = False,
    ) -> None:
        inner = model.model
        self.note = ""
        self.choice = ForwardChoice("split", len(inner.layers), frozen_layers)
        self.packs = False  # until it is proved
        self.dtype: mx.Dtype | None = None
        self.head_is_frozen = not trained_outside_layers(model)
        self.frozen_layers = frozen_layers
        self.frozen_released = False
        self.layer_count = len(inner.layers)
        self.skips = False  # until it is proved that the last layer may skip positions
        self._packing: Layout | None = None
        self._wanted: mx.array | None = None
        self._last_layer = inner.layers[-1]
        self.streamed_from = weights
        self._recompute: Callable[[nn.Module], AbstractContextManager[None]] = nullcontext
        if recompute_inputs:
            self._recompute = recompute_cheap_inputs
        elif not on_cpu():
            self._recompute = keep_inputs_of_gates
        self._frozen, tops = inner.layers[:frozen_layers], inner.layers[frozen_layers:]
        if grad_checkpoint:
            tops = [checkpointed(layer, self._as_asked) for layer in tops]
        self._prefix = Part(inner, 0, self._frozen, norm=False)
        self._top = Part(inner, frozen_layers, tops, norm=True)
        self._head = copy.copy(model)
        self._head.model = Given(inner)

    def prefix(self, ids: mx.array) -> mx.array:
        if self.frozen_layers == 0:
            return mx.zeros((*ids.shape, 0))
        return self._prefix(ids)

    def evaluate(self, *arrays: Any) -> None:
        if self.streamed_from is not None:
            unread, _ = read_lazily(self.streamed_from)
            for layer, other in zip(self._frozen, unread.model.layers, strict=False):
                layer.update(other.parameters())
        mx.eval(*arrays)

    def prefix_after(self, ids: mx.array, caches: Sequence[Any]) -> mx.array:
        """Return the prefix of ids (B, T) that follow what the layers' `caches` hold."""
        return self._prefix(ids, caches=caches)

    @contextmanager
    def _as_asked(self, model: nn.Module) -> Iterator[None]:
        with (
            attention_with_gradient(),
            packed(model, self._packing),
            only_at(self._last_layer, self._wanted),
            self._recompute(model),
        ):
            yield

    def top(
        self,
        ids: mx.array,
        prefix: mx.array,
        packing: Layout | None = None,
        wanted: mx.array | None = None,
    ) -> mx.array:
        # Kept until the next call: layers that are computed twice ask for it then.
        self._packing = packing
        self._wanted = wanted if self.skips and worthwhile(wanted, ids.size) else None
        return self._top(ids, prefix, within=self._as_asked)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Within, no layer computes in 16 bits; the weights are as they are stored."""
        with self._prefix.in_float32(), self._top.in_float32():
            yield

    def head(self, hidden: mx.array) -> mx.array:
        logits: mx.array = self._head(hidden[None])[0]
        return logits

    def release_frozen(self) -> None:
        for layer in self._frozen:
            layer.update(tree_map(lambda array: mx.zeros((0,), array.dtype), layer.parameters()))
        self.frozen_released = True

    def restore_frozen(self, layers: Sequence[nn.Module]) -> None:
        for layer, other in zip(self._frozen, layers, strict=True):
            layer.update(other.parameters())
        self.frozen_released = False


class PlainForward:
    """The model as it is: nothing cached, logits everywhere, trained ones picked afterwards."""

    def __init__(self, model: nn.Module, note: str) -> None:
        self.note = note
        self.choice = ForwardChoice("plain", len(getattr(model, "layers", ())), reason=note)
        self.frozen_layers = 0
        self.frozen_released = False
        # The logits stand in for the hidden states here, and nothing comes after them.
        self.head_is_frozen = True
        self.packs = False
        self.dtype: mx.Dtype | None = None
        self._model = model

    def prefix(self, ids: mx.array) -> mx.array:
        return mx.zeros((*ids.shape, 0))

    def evaluate(self, *arrays: Any) -> None:
        mx.eval(*arrays)

    def top(
        self,
        ids: mx.array,
        prefix: mx.array,
        packing: Layout | None = None,
        wanted: mx.array | None = None,
    ) -> mx.array:
        assert packing is None, "its rows are padded"
        with attention_with_gradient():
            logits: mx.array = self._model(ids)
        return logits

    def head(self, hidden: mx.array) -> mx.array:
        return hidden

    def release_frozen(self) -> None:
        pass  # nothing is frozen apart

    def restore_frozen(self, layers: Sequence[nn.Module]) -> None:
        pass


@dataclass(frozen=True)
class Proof:
    """Distance of the split from the plain model: largest difference over largest value."""

    relative_difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        # Written so that NaN fails.
        return bool(self.relative_difference <= self.tolerance)


@dataclass(frozen=True)
class RowStates:
    """A split's states of a row: ids (1, T), their prefix and final states (1, T, hidden).

    The states of a row's beginning are the beginning of the row's states.
    """

    ids: mx.array
    prefix: mx.array
    hidden: mx.array

    def first(self, tokens: int) -> RowStates:
        """Return the states of the row's first tokens alone."""
        ids, prefix, hidden = (a[:, :tokens] for a in (self.ids, self.prefix, self.hidden))
        return RowStates(ids, prefix, hidden)


def states_of(split: Forward, row: Sequence[int]) -> RowStates:
    """Return the split's states of a row, evaluated."""
    ids = mx.array([list(row)])
    prefix = split.prefix(ids)
    hidden = split.top(ids, prefix)
    split.evaluate(prefix, hidden)
    return RowStates(ids, prefix, hidden)


def prove_equal(model: nn.Module, split: Forward, rows: Sequence[RowStates]) -> Proof:
    """Compare the split with the plain model on real rows: final states and the first 64 logits.

    The same tokens go through both, in the type that computes: on a GPU the order of a sum depends
    on the shapes of a product. A split holds for rows up to the longest one given: beyond a sliding
    window, layers differ that are alike before it. Without rows nothing is proved.
    """
    worst, tolerance = 0.0 if rows else float("inf"), EQUAL_TOLERANCE
    for row in rows:
        few = row.ids[:, :PROOF_LOGIT_TOKENS]
        start = row if few.size == row.ids.size else states_of(split, np.array(few[0]).tolist())
        plain_hidden = model.model(row.ids)
        split.evaluate(plain_hidden)
        plain_logits = model(few)[0]
        split.evaluate(plain_logits)
        pairs = ((row.hidden, plain_hidden), (split.head(start.hidden[0]), plain_logits))
        for ours, plain in pairs:
            tolerance = same_shape_tolerance(plain.dtype)
            difference = relative_difference(ours, plain)
            if not difference <= worst:  # NaN too
                worst = difference
            if worst != worst:
                return Proof(worst, tolerance)
    return Proof(worst, tolerance)


# Packing and skipping change the shapes of products, and so, in 16 bits on a GPU, every result by
# more than a wrong one might. They are proved in float32, where a wrong one cannot hide: the same
# code with the same weights, only the activations are wider.


def in_float32(split: SplitForward, row: RowStates) -> RowStates:
    """Return a row's states with final ones of more than 16 bits, computed again if they are not.

    The prefix stays as it is: it is given, and the layers above widen it.
    """
    if row.hidden.dtype not in SIXTEEN_BITS:
        return row
    with split.in_float32():
        return replace(row, hidden=split.top(row.ids, row.prefix))


def prove_packing(split: SplitForward, row: RowStates) -> Proof:
    """Compare a row packed with its first half to the two one by one, by final hidden states."""
    tokens = row.ids.size
    half = max(1, tokens // 2)
    row = in_float32(split, row)
    pair = [(each.ids, each.prefix, each.hidden) for each in (row, row.first(half))]
    ids, prefix, apart = (mx.concatenate(list(a), axis=1) for a in zip(*pair, strict=True))
    with split.in_float32():
        together = top_of_packed(split, ids, prefix, Packing(0, (tokens, half)))
    return Proof(relative_difference(together, apart), EQUAL_TOLERANCE)


def top_of_packed(forward: Forward, ids: mx.array, prefix: mx.array, packing: Packing) -> mx.array:
    """Return the final states (1, T, hidden) of packed rows, computed as the device packs them."""
    places = places_of(packing)
    if places is None:
        return forward.top(ids, prefix, packing)
    ids, prefix = (at_the_end(array, places.tokens) for array in (ids, prefix))
    return forward.top(ids, prefix, places)[:, : packing.tokens]


def prove_skipping(split: SplitForward, row: RowStates) -> Proof:
    """Compare the last layer at every third of a row's first positions to that of the whole row.

    The skipped parts treat each position by itself, so the row need not be long.
    """
    start = in_float32(split, row.first(PROOF_LOGIT_TOKENS))
    wanted = mx.arange(1, start.ids.size, 3)
    split.skips = True
    try:
        with split.in_float32():
            few = split.top(start.ids, start.prefix, None, wanted)[0]
    finally:
        split.skips = False
    return Proof(relative_difference(few[wanted], start.hidden[0, wanted]), EQUAL_TOLERANCE)


def _holds(
    proof: Callable[[SplitForward, RowStates], Proof], split: SplitForward, row: RowStates
) -> bool:
    try:
        return proof(split, row).holds
    except Exception as error:  # any model's code, called in a way that its author did not plan
        if device_failure(error):
            raise
        return False


def trained_outside_layers(model: nn.Module) -> list[str]:
    """Return the trainable parameters that are in no layer: of the embedding, norm or head."""
    names = (name for name, _ in tree_flatten(model.trainable_parameters()))
    return [name for name in names if "layers" not in name.split(".")]


def text_model(model: nn.Module) -> nn.Module:
    """Return the language model within a model that wraps one (of images and text, say), else the
    model itself.
    """
    while "model" not in model and isinstance(model.get("language_model"), nn.Module):
        model = model["language_model"]
    return model


def choose_forward(
    model: nn.Module,
    adapted_layers: int,
    rows: Sequence[Sequence[int]],
    grad_checkpoint: bool = False,
    weights: Path | None = None,
    recompute_inputs: bool = False,
) -> PlainForward | SplitForward:
    """Return the split if it fits the model and is proved equal on `rows`, else the plain one.

    The note of the result gives the choice and its reason.

    adapted_layers: number of adapted layers, from the top.
    rows: real rows, one of them as long as the longest that is trained or validated.
    weights: the model's folder, to read frozen layers from when they are needed.
    recompute_inputs: as in `SplitForward`; not for layers with dropout.
    """
    name = type(model).__module__.rsplit(".", 1)[-1]
    whole, model = model, text_model(model)
    inner = getattr(model, "model", None)
    if inner is None or not all(hasattr(inner, part) for part in ("layers", "norm")):
        return PlainForward(whole, f"plain forward: {name} is not built as embed, layers, norm")
    try:
        frozen = max(0, len(inner.layers) - adapted_layers)
        if trained_outside_layers(whole):
            frozen = 0  # an embedding that is trained moves every layer above it
        streamed = weights if frozen else None
        split = SplitForward(model, frozen, grad_checkpoint, streamed, recompute_inputs)
        states = [states_of(split, row) for row in rows]
        proof = prove_equal(model, split, states)
    except Exception as error:  # any model's code, called in a way that its author did not plan
        if device_failure(error):
            raise
        return PlainForward(whole, f"plain forward: {name} does not take the split ({error})")
    if not proof.holds:
        return PlainForward(
            whole,
            f"plain forward: the split of {name} differs by {proof.relative_difference:.1e} "
            f"(limit {proof.tolerance:.0e})",
        )
    longest = max(states, key=lambda row: row.ids.size)
    split.dtype = longest.hidden.dtype
    split.packs = _holds(prove_packing, split, longest)
    skippable = bool(parts_of(inner.layers[-1]))
    split.skips = skippable and _holds(prove_skipping, split, longest)
    split.choice = replace(
        split.choice,
        packs=split.packs,
        skips=split.skips,
        relative_difference=proof.relative_difference,
        tolerance=proof.tolerance,
    )
    split.note = _in_words(split.choice, split.streamed_from is not None, grad_checkpoint)
    if recompute_inputs:
        split.note += "; norms and gates computed twice"
    return split


def _in_words(choice: ForwardChoice, streamed: bool, grad_checkpoint: bool) -> str:
    """Return what the split saves, and how equal it was found to be."""
    return (
        f"{choice.frozen_layers} of {choice.layers} layers frozen"
        + (", computed once a row" if choice.frozen_layers else "")
        + "; logits "
        + ("and most of the last layer " if choice.skips else "")
        + "only at trained tokens; equal to the plain forward within "
        + f"{choice.relative_difference:.1e}"
        + ("; rows behind each other, unpadded" if choice.packs else "; rows padded")
        + ("; activations computed twice" if grad_checkpoint else "")
        + ("; frozen weights read when needed" if streamed else "")
    )
