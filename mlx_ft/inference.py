"""Load a model with MLX, and generate from it in batches.

Does: choose how a model is held and computed on this machine (and say so), attach an adapter after
checking that it fits entirely, generate greedily from token ids. Does not: resolve names
(`models.py`), render conversations (`chat.py`), or score anything.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import _get_classes, dequantize_model
from mlx_lm.utils import load_model as mlx_lm_load_model

from mlx_ft.backend import configure_backend, on_cpu
from mlx_ft.chat import ChatRenderer
from mlx_ft.decoding import answer_prompts
from mlx_ft.errors import Fault, ModelError


@dataclass(frozen=True)
class Generation:
    """One answer: text without control tokens, its ids (stop token excluded), and why it ended.

    `finish_reason` is "stop" (a stop token), "length" (max_tokens reached), or "loop" (ended, as
    its tokens only repeated themselves).
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with its renderer; `compute` says in words how it is held and computed."""

    model: nn.Module
    renderer: ChatRenderer
    config: dict[str, Any]
    compute: str


def scalar(array: mx.array) -> float:
    """Return a one-element array as a Python number."""
    value = array.item()
    assert not isinstance(value, complex)
    return float(value)


def hold_for_cpu(model: nn.Module) -> nn.Module:
    """Return the model dequantized and in float32: same weights, the only type fast on a CPU.

    Quantized matmul on x86 runs at about 1/80 of float32 through OpenBLAS; the float32 weights are
    exactly the numbers that the quantized file stands for.
    """
    model = dequantize_model(model)
    model.update(tree_map(_to_float32, model.parameters()))
    mx.eval(model.parameters())
    return model


def _to_float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def attach_adapter(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Put the adapter in `folder` (mlx-lm's format) on the model and return its config.

    Unlike mlx-lm, which leaves a layer without its tensors untouched, the set of names and every
    shape must be equal; raises ModelError with all differences.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        weights = mx.load(str(folder / "adapters.safetensors"))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            Fault(str(folder), f"no readable adapter ({error})", "train it again")
        ) from error
    assert isinstance(weights, dict)
    model.freeze()
    make_trainable_layers(model, config)
    expected = {name: array.shape for name, array in tree_flatten(model.trainable_parameters())}
    faults = adapter_faults(folder, expected, {name: a.shape for name, a in weights.items()})
    if faults:
        raise ModelError(faults)
    model.load_weights(list(weights.items()), strict=False)
    model.eval()
    # What lies under the adapter is not touched: it may be meant to be read later.
    mx.eval(model.trainable_parameters())
    return dict(config)


def make_trainable_layers(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Unfreeze, on a frozen model, what an adapter_config.json of mlx-lm's form trains: LoRA or
    DoRA layers that are put on its top layers, or all weights of these (`full`).

    Raises ValueError for modules that mlx-lm has no such layer for.
    """
    kind, layers = config.get("fine_tune_type", "lora"), config["num_layers"]
    if kind == "full":
        for layer in model.layers[-layers:]:
            layer.unfreeze()
        return
    linear_to_lora_layers(model, layers, config["lora_parameters"], use_dora=kind == "dora")


def adapter_faults(
    folder: Path,
    expected: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
) -> list[Fault]:
    """Return a fault each for adapter tensors that are missing, unknown, or of another shape: the
    first of them, and how many more there are.
    """
    shared = expected.keys() & found.keys()
    other = [name for name in shared if tuple(expected[name]) != tuple(found[name])]
    groups: tuple[tuple[Collection[str], Callable[[str], str]], ...] = (
        (expected.keys() - found.keys(), lambda name: "missing from the adapter"),
        (found.keys() - expected.keys(), lambda name: "not a tensor of this model's adapter"),
        (other, lambda name: f"shape {found[name]}, the model needs {expected[name]}"),
    )
    fix = "use the adapter with the model and layers it was trained on"
    faults = []
    for names, in_words in groups:
        if names:
            first, more = min(names), len(names) - 1
            rest = f"; and {more} more like it" if more else ""
            faults.append(Fault(f"{folder}: {first}", f"{in_words(first)}{rest}", fix))
    return faults


def read_lazily(
    folder: Path, classes: Callable[[Mapping[str, Any]], tuple[Any, Any]] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return (model, config) of a model folder, no weight read before it is used.

    `classes` gives the model's class and that of its arguments for a config, in place of mlx-lm's.
    Raises ModelError when mlx-lm does not know the architecture or the weights do not fit it.
    """
    try:
        model, config = mlx_lm_load_model(
            folder, lazy=True, trust_remote_code=False, get_model_classes=classes or _get_classes
        )
    except (ValueError, TypeError, FileNotFoundError, RuntimeError, KeyError) as error:
        raise ModelError(
            Fault(str(folder), f"mlx-lm cannot load it ({error})", "use a model that mlx-lm runs")
        ) from error
    return model, config


def load_weights(folder: Path, low_memory: bool = False) -> tuple[nn.Module, dict[str, Any], str]:
    """Return (model, config, compute) of a model folder, held as suits this machine, or with
    `low_memory` as stored and not read yet. Raises ModelError.
    """
    configure_backend()
    model, config = read_lazily(folder)
    if low_memory:
        compute = f"{mx.default_device()}, weights as stored, read when they are used"
    elif on_cpu():
        model = hold_for_cpu(model)
        compute = "float32 on the CPU (quantized weights expanded, value for value)"
    else:
        mx.eval(model.parameters())
        compute = f"{mx.default_device()}, weights as stored"
    model.eval()
    return model, config, compute


def load_layers(folder: Path, count: int, low_memory: bool = False) -> list[nn.Module]:
    """Return the first `count` layers of a model folder as `load_weights` would hold them; the rest
    of the model is not read.
    """
    configure_backend()
    model, _ = read_lazily(folder)
    layers: list[nn.Module] = model.model.layers[:count]
    if not low_memory and on_cpu():
        layers = hold_for_cpu(nn.Sequential(*layers)).layers
    return layers


def load_model(
    folder: Path,
    *,
    adapter: Path | None,
    enable_thinking: bool,
    date: str,
    low_memory: bool = False,
) -> LoadedModel:
    """Load a model folder, with an adapter if one is given, and its renderer. Raises ModelError."""
    renderer = ChatRenderer.from_folder(folder, enable_thinking=enable_thinking, date=date)
    model, config, compute = load_weights(folder, low_memory)
    if adapter is not None:
        attach_adapter(model, adapter)
    return LoadedModel(model, renderer, config, compute)


def release() -> None:
    """Give memory of models that nobody refers to any more back to the system."""
    gc.collect()
    mx.clear_cache()


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    batch_size: int = 32,
    on_done: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """Generate greedily from prompts of token ids, `batch_size` at a time.

    `max_tokens` is for all prompts or one for each. Results come back in the order given, and
    `on_done(index, generation)` is called as each one ends.
    """
    results: dict[int, Generation] = {}

    def on_end(index: int, ids: tuple[int, ...], reason: str) -> None:
        results[index] = Generation(loaded.renderer.decode(ids), ids, reason)
        if on_done is not None:
            on_done(index, results[index])

    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    answer_prompts(
        loaded.model,
        prompts,
        stop_ids=loaded.renderer.stop_ids,
        max_tokens=limits,
        batch_size=batch_size,
        on_end=on_end,
    )
    return [results[index] for index in range(len(prompts))]
