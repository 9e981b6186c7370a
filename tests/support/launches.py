"""Count the kernels that a graph launches on a GPU, on a machine without one.

A CPU's graph has the parts of MLX's fast operations, of which a GPU has one kernel each. Within
`fast_operations`, each is one stand-in of the same shapes, forward and backward.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx

# They give other shapes to what is there, or order other work (CustomTransforms, Depends).
VIEWS = frozenset(
    "AsStrided Broadcast BroadcastAxes CustomTransforms Depends ExpandDims Flatten Reshape Slice "
    "Split Squeeze StopGradient Transpose Unflatten View".split()
)
COPIES = "copies of a concatenation"
NODE = re.compile(r'\{ (\d+) \[label ="(\w+)", shape=rectangle\]; \}')
INPUT = re.compile(r'^"\w+" -> (\d+)$', re.MULTILINE)


def launches(*outputs: Any) -> Counter[str]:
    """Return the kernels of an unevaluated graph by primitive.

    A concatenation copies each of its inputs by a kernel: all but one are counted as COPIES.
    """
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    graph = text.getvalue()
    inputs = Counter(INPUT.findall(graph))
    found: Counter[str] = Counter()
    for node, name in NODE.findall(graph):
        if name not in VIEWS:
            found[name] += 1
            if name == "Concatenate":
                found[COPIES] += inputs[node] - 1
    return found


def _normed(values: mx.array, *_: Any, **__: Any) -> mx.array:
    return mx.cumsum(values, axis=-1)


def _crossed(logits: mx.array, targets: mx.array) -> mx.array:
    return mx.max(logits, axis=-1)


def _attended(queries: mx.array, keys: mx.array, values: mx.array, *_: Any, **__: Any) -> mx.array:
    @mx.custom_function
    def attention(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return mx.cumsum(queries, axis=-1)

    @attention.vjp
    def gradient(arrays: Any, slope: Any, _: Any) -> Any:
        again = mx.cumsum(slope, axis=-1)
        parts = (again[:, :1, :1], again[:, :1, 1:2])  # not the same, or they would be merged
        others = (mx.broadcast_to(p, a.shape) for p, a in zip(parts, arrays[1:], strict=True))
        return again, *others

    found: Any = attention(queries, keys, values)
    outputs: mx.array = found
    return outputs


@contextmanager
def fast_operations() -> Iterator[None]:
    """Within, norms, rotations and attention are a kernel each way, and compute something else."""
    with (
        mock.patch.object(mx.fast, "rms_norm", _normed),
        mock.patch.object(mx.fast, "layer_norm", _normed),
        mock.patch.object(mx.fast, "rope", _normed),
        mock.patch.object(mx.fast, "scaled_dot_product_attention", _attended),
        mock.patch.object(mx.fast, "cross_entropy", _crossed),
    ):
        yield
