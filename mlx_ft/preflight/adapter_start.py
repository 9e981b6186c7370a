"""Check `resume_adapter_file`: do its tensors fit the recipe's adapter?

Does not: read a weight. For architectures unknown to `model/shapes.py`, only rank and layers are
compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from mlx_ft.model.shapes import ModelShape, Module, model_shape
from mlx_ft.preflight.findings import Finding, PreflightInput, some_of
from mlx_ft.preflight.forecast import adapted_modules
from mlx_ft.recipe.schema import TrainRecipe

CHECK = "resume_adapter_file"
LIMIT = "the layers, modules and rank of the recipe's adapter"
FIX = "name an adapter that was made with these settings, or set them as it was made"
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)")

Shapes = Mapping[str, tuple[int, ...]]


def resume_adapter_file(facts: PreflightInput) -> Finding:
    """Adapter weights that do not fit into the adapter that is trained."""
    found, train = facts.start_shapes, facts.recipe.train
    if found is None:
        return Finding(CHECK, "ok", "training starts from a fresh adapter", LIMIT, "")
    differences = list(_differences(found, facts))
    if differences:
        measured = f"{train.resume_adapter_file}: {'; '.join(differences)}"
        return Finding(CHECK, "fail", measured, LIMIT, FIX)
    return Finding(CHECK, "ok", f"its {len(found)} tensors fit", LIMIT, "")


def adapter_shapes(shape: ModelShape, train: TrainRecipe) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a LoRA or DoRA adapter, as mlx-lm names them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in adapted_modules(shape, train).items():
        one, other = _pair(module, train.lora_parameters.rank)
        shapes |= {f"{name}.lora_a": one, f"{name}.lora_b": other}
        if train.fine_tune_type == "dora":
            shapes[f"{name}.m"] = (module.rows,)
    return shapes


def _pair(module: Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if module.experts > 1:
        return (module.experts, rank, module.inputs), (module.experts, module.outputs, rank)
    return (module.inputs, rank), (rank, module.outputs)


def _differences(found: Shapes, facts: PreflightInput) -> Iterator[str]:
    """Yield in words what differs, each kind of difference once."""
    train, shape = facts.recipe.train, model_shape(facts.model_config)
    kind = _kind(found)
    if kind != train.fine_tune_type:
        yield f"it is {_in_words(kind)}, the recipe says {train.fine_tune_type}"
    expected = None
    if shape is not None and "full" not in (kind, train.fine_tune_type):
        expected = adapter_shapes(shape, train)
    rank = train.lora_parameters.rank
    ranks = sorted(_ranks(found))
    if ranks and train.fine_tune_type != "full" and ranks != [rank]:
        yield f"it has rank {some_of(ranks)}, the recipe says {rank}"
    there, wanted = _layers(found), _wanted_layers(expected, facts)
    if wanted is not None and there != wanted:
        yield f"it has {_span(there)}, the recipe trains {_span(wanted)}"
    if expected is None:
        return
    ours, theirs = _modules(expected), _modules(found)
    if ours - theirs:
        yield f"it has no {some_of(sorted(ours - theirs))}"
    if theirs - ours:
        yield f"the recipe trains no {some_of(sorted(theirs - ours))}"
    widths = [
        name
        for name in expected.keys() & found.keys()
        if expected[name] != found[name] and ranks == [rank]
    ]
    if widths:
        name = min(widths)
        yield (
            f"{len(widths)} tensors are of another width, such as {name} with {found[name]} "
            f"where the model needs {expected[name]}"
        )


def _kind(found: Shapes) -> str:
    if not any(name.endswith(".lora_a") for name in found):
        return "full"
    return "dora" if any(name.endswith(".m") for name in found) else "lora"


def _in_words(kind: str) -> str:
    return "no adapter" if kind == "full" else f"a {kind} adapter"


def _ranks(found: Shapes) -> set[int]:
    """Return the ranks of the adapter's matrices; those of experts are (experts, rank, inputs)."""
    return {
        shape[-1] if len(shape) == 2 else shape[-2]
        for name, shape in found.items()
        if name.endswith(".lora_a") and len(shape) >= 2
    }


def _layers(found: Shapes) -> set[int]:
    return {int(match[1]) for name in found if (match := LAYER.search(name))}


def _wanted_layers(expected: Shapes | None, facts: PreflightInput) -> set[int] | None:
    """Return the layers that are trained, None where that is not known."""
    if expected is not None:
        return _layers(expected)
    count, train = facts.model_config.get("num_hidden_layers"), facts.recipe.train
    if not isinstance(count, int) or train.lora_parameters.keys is not None:
        return None
    wanted = count if train.num_layers < 0 else min(train.num_layers, count)
    return set(range(count - wanted, count))


def _modules(shapes: Shapes) -> set[str]:
    """Return the modules' names within a layer, or from the root."""
    names = (name.rpartition(".")[0] for name in shapes)
    return {match[2] if (match := LAYER.search(name)) else name for name in names}


def _span(layers: set[int]) -> str:
    if not layers:
        return "no layers"
    if len(layers) == 1:
        return f"layer {min(layers)}"
    if max(layers) - min(layers) + 1 == len(layers):
        return f"layers {min(layers)} to {max(layers)}"
    return f"layers {some_of(sorted(layers))}"
