"""Checks of what the device computes, on a miniature: forward, gradients, repetition, quantization.

References are float32 on the CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_ft.doctor.checks import REPORT, Check
from mlx_ft.doctor.miniature import WORDS, Step, adapt, miniature, rows_of
from mlx_ft.engine.load import hold_for_cpu, scalar
from mlx_ft.recipe.schema import TrainRecipe
from mlx_ft.train.numerics.forward import (
    Forward,
    PlainForward,
    SplitForward,
    choose_forward,
    prove_equal,
    states_of,
)

PROVED_LENGTHS, SPANS, LENGTHS = (20, 300), (4, 9, 300), (40, 90, 17)
# Two orders of float32 sums; a wrong kernel is off by the order of one.
FLOAT32_TOLERANCE = 1e-3
# Two layers of rounding to bfloat16 are 0.06 (measured on a CPU).
GRADIENT_TOLERANCE = 0.2
WIDTHS = (4, 5, 6, 8)


def numerics() -> list[tuple[str, Callable[[], Check]]]:
    """Return the checks of what is computed, by name."""
    return [
        ("forward", forward_chosen),
        ("gradient", gradient),
        ("short rows", short_rows),
        ("same bits", same_bits),
        ("quantization", quantization),
    ]


def _chosen(model: nn.Module) -> Forward:
    return choose_forward(model, 1, [list(range(3, length + 3)) for length in PROVED_LENGTHS])


def forward_chosen() -> Check:
    """Say which forward a training would take, and how far it is from the plain one."""
    model = miniature()
    adapt(model, 1)
    forward = _chosen(model)
    if not isinstance(forward, SplitForward):
        advice = f"trainings here are slower and larger than they should be; {REPORT}"
        return Check("forward", "warn", forward.note, advice, {"split": False})
    row = states_of(forward, [token % WORDS for token in range(3, 303)])
    difference = prove_equal(model, forward, [row]).relative_difference
    figures = {
        "split": True,
        "packs": forward.packs,
        "skips": forward.skips,
        "relative_difference": difference,
    }
    found = f"split; differs from the plain one by {difference:.1e} of the largest value"
    if not (forward.packs and forward.skips):
        missing = "rows are padded" if not forward.packs else "no position of a layer is skipped"
        return Check("forward", "warn", f"{found}, but {missing}", REPORT, figures)
    return Check("forward", "ok", f"{found}; rows unpadded, positions skipped", "", figures)


def _gradient(in_float32: bool) -> np.ndarray:
    """Return the gradient of all adapter matrices of the miniature, one after the other."""
    model = hold_for_cpu(miniature()) if in_float32 else miniature()
    adapt(model, 2)
    forward, rows = PlainForward(model, ""), rows_of((40, 90))

    def loss() -> mx.array:
        total = mx.zeros(())
        for index in range(len(rows)):
            ids, trained = (mx.array(a) for a in rows.row(index))
            logits = forward.top(ids[None, :-1], forward.prefix(ids[None, :-1]))[0]
            each = nn.losses.cross_entropy(logits.astype(mx.float32), ids[1:])
            total = total + (each * trained[1:]).sum()
        return total

    _, found = nn.value_and_grad(model, loss)()
    named = sorted(tree_flatten(found))
    return np.concatenate([np.array(a.astype(mx.float32)).ravel() for _, a in named])


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """Return the length of a difference over that of the other."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def gradient() -> Check:
    """Compare an adapter's gradient with that of the same weights in float32 on the CPU.

    On the device it is computed twice: in float32, where a wrong kernel cannot hide, and in the
    type of a training.
    """
    with mx.stream(mx.cpu):
        reference = _gradient(in_float32=True)
    in_float32 = _apart(_gradient(in_float32=True), reference)
    as_trained = _apart(_gradient(in_float32=False), reference)
    figures = {
        "relative_difference_float32": in_float32,
        "limit_float32": FLOAT32_TOLERANCE,
        "relative_difference_as_trained": as_trained,
        "limit_as_trained": GRADIENT_TOLERANCE,
    }
    found = f"in float32 {in_float32:.1e}, as trained {as_trained:.1e} of its length from the CPU's"
    if not (in_float32 <= FLOAT32_TOLERANCE and as_trained <= GRADIENT_TOLERANCE):
        return Check("gradient", "fail", found, f"do not train here; {REPORT}", figures)
    return Check("gradient", "ok", found, "", figures)


def short_rows() -> Check:
    """Train on rows of 4, 9 and 300 tokens, one by one; short ones have attention of their own."""
    model = miniature()
    recipe = adapt(model, 1)
    forward = _chosen(model)
    losses = {n: Step.of(model, recipe, forward, (n,)).take() for n in SPANS}
    figures = {f"loss_of_{tokens}_tokens": loss for tokens, loss in losses.items()}
    broken = [str(tokens) for tokens, loss in losses.items() if not np.isfinite(loss)]
    if broken:
        found = f"no finite loss for rows of {', '.join(broken)} tokens"
        return Check("short rows", "fail", found, f"do not train here; {REPORT}", figures)
    return Check("short rows", "ok", "rows of 4, 9 and 300 tokens train", "", figures)


def _after_steps(resumed: bool) -> dict[str, mx.array]:
    """Return the adapter after four steps; `resumed`: written and read again after two."""
    model = miniature()
    recipe = adapt(model, 1)
    step = Step.of(model, recipe, _chosen(model), LENGTHS)
    for index in range(4):
        if resumed and index == 2:
            step = _from_disk(step, recipe)
        step.take()
    return dict(tree_flatten(step.model.trainable_parameters()))


def _from_disk(step: Step, recipe: TrainRecipe) -> Step:
    """Return a step like another, its weights and optimizer state written and read again."""
    trees = (step.model.trainable_parameters(), step.optimizer.state)
    with tempfile.TemporaryDirectory() as folder:
        read = []
        for name, tree in zip(("weights", "state"), trees, strict=True):
            file = str(Path(folder) / f"{name}.safetensors")
            mx.save_safetensors(file, dict(tree_flatten(tree)))
            arrays = mx.load(file)
            assert isinstance(arrays, dict)
            mx.eval(arrays)
            read.append(list(arrays.items()))
    weights, state = read
    model = miniature()
    adapt(model, 1)
    model.load_weights(weights, strict=False)
    return Step.of(model, recipe, _chosen(model), LENGTHS, tree_unflatten(state))


def same_bits() -> Check:
    """Take the same steps twice, and once more with a pause: are the bits equal?"""
    first, again, resumed = (_after_steps(resumed) for resumed in (False, False, True))
    differences = {
        name: max(scalar(mx.abs(first[key] - other[key]).max()) for key in first)
        for name, other in (("again", again), ("resumed", resumed))
    }
    figures = {f"largest_difference_{name}": value for name, value in differences.items()}
    if any(differences.values()):
        worst = max(differences.values())
        found = f"the same step gives other bits: {worst:.1e} apart after four"
        advice = "a resumed run will equal an unbroken one in its results, not in its bits"
        return Check("same bits", "warn", found, advice, figures)
    return Check("same bits", "ok", "the same step twice, and resumed: equal bits", "", figures)


def quantization() -> Check:
    """Quantize the same weights to 4, 5, 6 and 8 bits on the device and on the CPU."""
    mx.random.seed(2)
    weight = (mx.random.normal((512, 512)) * 0.02).astype(mx.float16)
    mx.eval(weight)
    figures: dict[str, float | int | str | bool | None] = {}
    unequal, far = [], []
    for bits in WIDTHS:
        ours = mx.quantize(weight, 64, bits)
        theirs = mx.quantize(weight, 64, bits, stream=mx.cpu)
        equal = all(mx.array_equal(a, b).item() for a, b in zip(ours, theirs, strict=True))
        wide = (mx.dequantize(*each, 64, bits).astype(mx.float32) for each in (ours, theirs))
        step = scalar(mx.abs(theirs[1].astype(mx.float32)).max())
        apart = scalar(mx.abs(next(wide) - next(wide)).max()) / step
        figures |= {f"equal_{bits}_bits": equal, f"steps_apart_{bits}_bits": apart}
        unequal += [] if equal else [str(bits)]
        far += [str(bits)] if not apart <= 1.0 else []
    if far:
        found = f"{', '.join(far)} bits: more than a step from the CPU's"
        return Check("quantization", "fail", found, f"do not export here; {REPORT}", figures)
    if unequal:
        found = f"{', '.join(unequal)} bits: other bits than the CPU's, within a step of them"
        advice = "an export here and one on a CPU are equal in results, not in bits"
        return Check("quantization", "warn", found, advice, figures)
    return Check("quantization", "ok", "4, 5, 6 and 8 bits equal the CPU's", "", figures)
