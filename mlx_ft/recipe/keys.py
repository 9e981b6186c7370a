"""Dotted keys: look up, flatten, suggest.

A key path is a tuple of names, such as ("train", "batch_size"); written out it has dots.
Does not: read files or judge values.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from mlx_ft.recipe.fields import Section
from mlx_ft.recipe.schema import Recipe

KeyPath = tuple[str, ...]
# Other tools' name of a key -> the recipe's. Compared in lower case, without - and _.
SYNONYMS: Mapping[str, str] = {
    "lr": "train.learning_rate",
    "peaklr": "train.learning_rate",
    "maxlength": "data.max_seq_length",
    "maxseqlen": "data.max_seq_length",
    "maxlen": "data.max_seq_length",
    "seqlength": "data.max_seq_length",
    "sequencelength": "data.max_seq_length",
    "sequencelen": "data.max_seq_length",
    "cutofflen": "data.max_seq_length",
    "contextlength": "data.max_seq_length",
    "dataset": "data.path",
    "datapath": "data.path",
    "datadir": "data.path",
    "trainonresponses": "data.mask_prompt",
    "trainoninputs": "data.mask_prompt",
    "completiononlyloss": "data.mask_prompt",
    "basemodel": "model",
    "modelname": "model",
    "modelnameorpath": "model",
    "modelpath": "model",
    "runname": "name",
    "thinking": "chat.enable_thinking",
    "r": "train.lora_parameters.rank",
    "lorar": "train.lora_parameters.rank",
    "lorarank": "train.lora_parameters.rank",
    "loraalpha": "train.lora_parameters.alpha",
    "lorascale": "train.lora_parameters.scale",
    "loradropout": "train.lora_parameters.dropout",
    "targetmodules": "train.lora_parameters.keys",
    "loratargetmodules": "train.lora_parameters.keys",
    "lorakeys": "train.lora_parameters.keys",
    "loralayers": "train.num_layers",
    "layers": "train.num_layers",
    "lora": "train.lora_parameters",
    "perdevicetrainbatchsize": "train.batch_size",
    "microbatchsize": "train.batch_size",
    "gradientaccumulation": "train.grad_accumulation_steps",
    "gradientaccumulationsteps": "train.grad_accumulation_steps",
    "gradaccum": "train.grad_accumulation_steps",
    "accumulation": "train.grad_accumulation_steps",
    "accumulationsteps": "train.grad_accumulation_steps",
    "numepochs": "train.epochs",
    "numtrainepochs": "train.epochs",
    "iterations": "train.iters",
    "maxsteps": "train.iters",
    "steps": "train.iters",
    "warmup": "train.lr_schedule.warmup_steps",
    "numcycles": "train.lr_schedule.cycles",
    "scheduler": "train.lr_schedule.name",
    "lrscheduler": "train.lr_schedule.name",
    "lrschedulertype": "train.lr_schedule.name",
    "optim": "train.optimizer",
    "weightdecay": "train.optimizer_config",
    "loggingsteps": "train.steps_per_report",
    "logevery": "train.steps_per_report",
    "evalsteps": "train.steps_per_eval",
    "evalevery": "train.steps_per_eval",
    "savesteps": "train.save_every",
    "stepspersave": "train.save_every",
    "savetotallimit": "train.keep_checkpoints",
    "randomseed": "train.seed",
    "earlystoppingpatience": "train.select.patience",
    "metricforbestmodel": "train.select.metric",
    "resume": "train.resume_adapter_file",
    "bits": "export.q_bits",
    "quantization": "export.q_bits",
    "groupsize": "export.q_group_size",
    "suite": "eval.suites",
}


def dotted(key: KeyPath) -> str:
    """Return a key path as it is written for people."""
    return ".".join(key)


def section_of(key: KeyPath) -> type[Section] | None:
    """Return the section at a key path, or None where there is none.

    `()` is the recipe itself. An item of a list of sections is named by its number.
    """
    section: type[Section] = Recipe
    items = False
    for part in key:
        if items:
            if not part.isdigit():
                return None
            items = False
            continue
        field = section.model_fields.get(part)
        inner: Any = None if field is None else field.annotation
        if get_origin(inner) is list:
            (inner,), items = get_args(inner), True
        if not (isinstance(inner, type) and issubclass(inner, Section)):
            return None
        section = inner
    return None if items else section


def value_keys(prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the path of every value that a recipe has, in the order of its declaration."""
    section = section_of(prefix)
    assert section is not None, f"{prefix} is not a section"
    for name in section.model_fields:
        key = (*prefix, name)
        if section_of(key) is None:
            yield key
        else:
            yield from value_keys(key)


def section_keys() -> set[KeyPath]:
    """Return the paths of all sections, the recipe itself left out."""
    return {key[:depth] for key in value_keys() for depth in range(1, len(key))}


def value_at(recipe: Recipe, key: KeyPath) -> Any:
    """Return the value at a key path of `value_keys`."""
    value: Any = recipe
    for part in key:
        value = getattr(value, part)
    return value


def squeezed(name: str) -> str:
    """Return a name as names are compared here: lower case, without - and _."""
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def meant_keys(unknown: KeyPath) -> list[str]:
    """Return the dotted keys that an unknown key may stand for, best first.

    Looks in the same section, at other tools' names, in the other sections, and then for similar
    spelling in the same section and in the others. [] when nothing is near.
    """
    *parents, name = unknown
    wanted = squeezed(name)
    keys = [*value_keys(), *sorted(section_keys())]
    here = [key for key in keys if key[:-1] == tuple(parents)]
    for group in (here, keys):
        same = [dotted(key) for key in group if squeezed(key[-1]) == wanted]
        if same:
            return same
        if wanted in SYNONYMS:
            return [SYNONYMS[wanted]]
    for group in (here, keys):
        names = {squeezed(key[-1]) for key in group}
        near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.75)
        if near:
            return [dotted(key) for key in group if squeezed(key[-1]) == near[0]]
    whole = difflib.get_close_matches(dotted(unknown), map(dotted, keys), n=1, cutoff=0.85)
    return list(whole)


def flattened(values: Mapping[str, Any], origins: Mapping[str, Any], at: str = "") -> list[str]:
    """Return the dotted keys of a recipe. A mapping with an origin of its own is one key."""
    keys = []
    for name, value in values.items():
        key = f"{at}{name}"
        if isinstance(value, Mapping) and value and key not in origins:
            keys += flattened(value, origins, f"{key}.")
        else:
            keys.append(key)
    return keys


def setting(values: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key."""
    value: Any = values
    for name in key.split("."):
        value = value[name]
    return value
